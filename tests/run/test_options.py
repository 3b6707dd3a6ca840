"""The options of a run: what must be the same to resume it, and the defaults of each variant."""

import dataclasses
from pathlib import Path

import pytest

from flatjax.run.options import SeedOptions, variant_of


@dataclasses.dataclass(frozen=True)
class Config(SeedOptions):
    width: int = 3
    extra: int = 0

    may_differ = frozenset({"extra", "seeds"})

    @property
    def default_name(self) -> str:
        return f"width-{self.width}"


VARIANTS = {"small": ("a small one", Config()), "large": ("a large one", Config(width=300, seeds=2))}


def test_options_that_may_differ_do_not_keep_a_run_from_being_resumed(tmp_path):
    Config(folder=tmp_path).open_run(model="mlp").append({"step": 0})
    resumed = Config(folder=tmp_path, resume=True, extra=7, seeds=4).open_run(model="mlp")
    assert resumed.folder == tmp_path / "width-3"
    assert resumed.records == [{"step": 0}]
    for other, model in ((Config(folder=tmp_path, resume=True, seed=1), "mlp"), (Config(), "resnet")):
        with pytest.raises(SystemExit, match="of another configuration"):
            dataclasses.replace(other, folder=tmp_path, resume=True).open_run(model=model)


def test_seeds_follow_on_the_first():
    assert list(Config(seed=5, seeds=3).all_seeds) == [5, 6, 7]


def test_a_variant_has_its_own_defaults_and_the_first_is_meant_where_none_is_named(capsys):
    assert variant_of(VARIANTS, []) == Config()
    assert variant_of(VARIANTS, ["--name", "run", "--folder", "there"]) == Config(name="run", folder=Path("there"))
    assert variant_of(VARIANTS, ["large", "--extra", "1"]) == Config(width=300, seeds=2, extra=1)
    with pytest.raises(SystemExit):
        variant_of(VARIANTS, ["large", "--help"])
    assert "(default: 300)" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        variant_of(VARIANTS, ["--help"])
    assert "a small one" in capsys.readouterr().out
