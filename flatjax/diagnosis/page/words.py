"""The page of a diagnosis gives each number its name, what it tells, and its formula."""

from typing import NamedTuple

from flatjax.run.records import Record


class Word(NamedTuple):
    """A word tells what one number of a part is."""

    part: str
    name: str
    label: str
    says: str
    formula: str = ""


LOSS = [
    Word("head", "loss", "loss", "Mean surprise at the next token, in nats. Lower is better.", "E[−log p(next token)]"),
    Word(
        "head",
        "perplexity",
        "perplexity",
        "How many tokens, equally likely, it would be as unsure between. Lower is better.",
        "exp(loss)",
    ),
]
FLATNESS = [
    Word(
        "head",
        "kappa",
        "κ of the head",
        "Relative flatness: how much the loss curves when the head's weights change "
        "in proportion to themselves. Larger is sharper; scaling features up and weights down leaves it as it is.",
        "κ = E ‖φ‖² Σ_s p_s ‖w_s − c‖², with c = Σ_s p_s w_s, φ what enters the head, w_s its row of token s",
    ),
    Word(
        "head",
        "kappa_hat",
        "κ̂ of the head",
        "The simplified measure that many papers report: the size of the head "
        "times the trace of its Hessian. Larger is sharper. It changes when the same vector is added to every row, "
        "which no prediction notices.",
        "κ̂ = ‖W‖² · E ‖φ‖² (1 − ‖p‖²)",
    ),
    Word("head", "squared_feature_norm", "‖φ‖²", "Mean squared size of what enters the head.", "E ‖φ‖²"),
    Word("head", "squared_head_norm", "‖W‖²", "Squared size of the head.", "Σ_s ‖w_s‖²"),
]
SHARPNESS = [
    Word("sharpness", "rise", "rise of the loss", "The worst that a relative change of every logit by at most ε "
         "does to the loss. Larger is more fragile. It depends only on logits and labels: no weight is moved.",
         "E[max ℓ(z + δ) − ℓ(z)] over |δ_j| ≤ ε (|z_j| + 1)"),
]  # fmt: skip
PROFILE = [
    Word("profile", "layer_kappa", "κ of the layer", "The same κ for every kernel of the network, estimated with "
         "random probes on a part of the text; the head's is exact. Larger is sharper. It may be negative, "
         "as a hidden layer is at no minimum of its own. The standard error has that of the probes in it.",
         "κ = Σ ⟨w_s, w_s'⟩ Tr H_{s,s'} = E_A ⟨WA, H[WA]⟩ over random signs A"),
]  # fmt: skip
COLLAPSE = [
    Word("collapse", "cdnv", "CDNV", "How wide the clouds of features before the same next token are, against how far "
         "two clouds lie apart. 0 is full collapse.", "mean over c ≠ c′ of (V_c + V_c′)/(2‖μ_c − μ_c′‖²)"),
    Word("decisions", "nc4", "NC4", "On how many tokens the network and the nearest class mean disagree, among tokens "
         "whose next token is a class. 0 is full collapse: the nearest class mean then decides as the network does. "
         "It does not say how often the nearest class mean is right. The same text gave the means.",
         "share of argmax z ≠ argmin_c ‖φ − μ_c‖"),
    Word("collapse", "nc3", "NC3", "How far the head's rows are from the class means, both of norm 1. It goes from "
         "0, full collapse (self-dual), to 4; it is about 2 where they have nothing to do with each other.",
         "‖W/‖W‖ − M̄/‖M̄‖‖²"),
    Word("collapse", "unc3", "UNC3", "How unequal the classes are in NC3: the variation over classes of the cosine "
         "between row and mean. 0 is equal.", "CoV over c of cos(w_c, μ_c − μ_G)"),
    Word("collapse", "gnc2_mean_means", "GNC2 of the means, mean", "How near two class means lie on the sphere, on "
         "average. Lower is farther apart; at right angles it is −0.347.", "mean over pairs of log 1/‖û_c − û_c′‖"),
    Word("collapse", "gnc2_variation_means", "GNC2 of the means, variation", "How unevenly the class means are "
         "spread over the sphere. 0 is even.", "CoV over pairs of log 1/‖û_c − û_c′‖"),
    Word("collapse", "gnc2_mean_classifier", "GNC2 of the head, mean", "How near two of the head's rows lie "
         "on the sphere, on average. Lower is farther apart.",
         "mean over pairs of log 1/‖ŵ_c − ŵ_c′‖"),
    Word("collapse", "gnc2_variation_classifier", "GNC2 of the head, variation", "How unevenly the head's rows are "
         "spread over the sphere. 0 is even.",
         "CoV over pairs of log 1/‖ŵ_c − ŵ_c′‖"),
    Word("collapse", "nc2_equinorm_means", "NC2 equal norms, means", "Variation of the distances of the class means "
         "from their centre. 0 is equal, as in full collapse.", "std/mean of ‖μ_c − μ_G‖"),
    Word("collapse", "nc2_equinorm_classifier", "NC2 equal norms, head", "Variation of the norms of the "
         "head's rows. 0 is equal, as in full collapse.",
         "std/mean of ‖w_c‖"),
    Word("collapse", "nc2_equiangularity_means", "NC2 equal angles, means", "How far the angles between class "
         "means are from those of a simplex. 0 is a simplex, as in full collapse.", "mean of |cos + 1/(C − 1)|"),
    Word("collapse", "nc2_equiangularity_classifier", "NC2 equal angles, head", "How far the angles between the "
         "head's rows are from those of a simplex. 0 is a simplex, as in full collapse.",
         "mean of |cos + 1/(C − 1)|"),
]  # fmt: skip
GEOMETRY = [
    Word("geometry", "rankme", "RankMe of σ", "How many directions the features fill, counted by singular values: "
         "RankMe as it was published. Larger is more directions.", "exp of the entropy of σ/Σσ"),
    Word("geometry", "rankme_of_variances", "RankMe of λ", "The number of directions counted by variances, which one "
         "published code has under the same name. It is never larger than RankMe of σ.",
         "exp of the entropy of λ/Σλ, λ = σ²"),
    Word("geometry", "participation_ratio", "participation ratio", "The number of directions counted with most "
         "weight on the largest ones.", "(Σλ)²/Σλ²"),
    Word("geometry", "alpha_req", "α-ReQ", "How fast the variance falls from direction to direction: λ_i ∝ i^−α. A "
         "larger α is fewer directions. It depends on the range that it is fitted to.",
         "minus the slope of log λ_i on log i, weights 1/i"),
]  # fmt: skip
TRAJECTORY = [
    Word("trajectory", "line_shape", "line-shape score", "How straight a token's way through the blocks is: 1 is a "
         "straight line, √L steps at right angles.", "L/‖Σ_l (x_{l+1} − x_l)/‖x_{l+1} − x_l‖‖"),
    Word("trajectory", "spacing", "variation of the steps", "How unequal the steps of the blocks are in length. 0 is "
         "equal.", "CoV over l of ‖x_{l+1} − x_l‖"),
    Word("trajectory", "growth_rate", "growth a block", "By how much the logarithm of a token's size grows a block.",
         "(log ‖x_L‖ − log ‖x_0‖)/L"),
    Word("trajectory", "growth_variation", "variation of the growth", "0 if a token's size grows exponentially with "
         "depth.", "CoV over l of log(‖x_{l+1}‖/‖x_l‖)"),
]  # fmt: skip
JACOBIANS = [
    Word("jacobians", "coupling", "block coupling", "Whether a block acts along the singular vectors of another as "
         "strongly as it can. 0 is full coupling, about 1 none; the mean over pairs of blocks.",
         "m_K(J₁, J₂) = ‖ |U₂ᵀJ₁V₂| − S₁ ‖/‖s₁‖, the top K singular vectors"),
    Word("jacobians", "alignment", "residual alignment (RA2)", "Whether the blocks stretch the stream along the same "
         "directions. 0 is aligned, about 1 not at all; the mean over pairs of blocks.",
         "mean |off-diagonal|/mean |diagonal| of |U_jᵀJ_iV_j|"),
    Word("jacobians", "inverse_norm_r_squared", "R² of 1/σ₁ by depth (RA4)", "1 if one over the largest singular value "
         "is a line in depth.", "R² of 1/σ₁(J_l) on l"),
    Word("jacobians", "relative_residual", "largest residual", "How far, at most, the nearest singular "
         "value is from one of these, as a share of the block's largest.", "max ‖Jv − su‖/s₁"),
]  # fmt: skip

ALL = [*LOSS, *FLATNESS, *SHARPNESS, *PROFILE, *COLLAPSE, *GEOMETRY, *TRAJECTORY, *JACOBIANS]
HEADLINES = [LOSS[0], LOSS[1], FLATNESS[0], FLATNESS[1], COLLAPSE[0], COLLAPSE[1], COLLAPSE[2], TRAJECTORY[0],
             JACOBIANS[0], JACOBIANS[1]]  # fmt: skip


def with_conventions(part: str, numbers: Record) -> Record:
    """Put each number's formula in front of what is said already of how it was taken."""
    formulas = {word.name: word.formula for word in ALL if word.part == part} | _NOT_ON_THE_PAGE.get(part, {})
    return {
        name: each | {"convention": "; ".join(filter(None, [formulas.get(name), each.get("convention")]))}
        for name, each in numbers.items()
    }


_NOT_ON_THE_PAGE = {
    "geometry": {"variances": "eigenvalues λ of the covariance of the features, at some ranks from 1, the largest, on"},
    "trajectory": {"norms": "‖x_l‖"},
    "jacobians": {
        "alignment_matrix": "of blocks i and j at [i, j], mean |off-diagonal|/mean |diagonal| of |U_jᵀJ_iV_j|",
        "coupling_matrix": "m_K(J_i, J_j) at [i, j]",
        "singular_values": "the largest of each J_l = ∂x_{l+1}/∂x_l − I",
    },
}
