"""Find how a program uses a kernel: along which axes it is multiplied with features, and which are those of a stack.

The program of a loss is followed from the kernel on, through whatever leaves its axes apart: moves and slices,
operations entry by entry as those of a norm or a mask, products with other parameters, calls and loops. Where it meets
data, that tells which axes the features run along. Nothing is assumed: a use that does not tell is a use that cannot be
read.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import NamedTuple

from jax.extend.core import Jaxpr, JaxprEqn, Var

from flatjax.layers.reading.axes import Axes, Read, Reading, Run, Selection, merged
from flatjax.layers.reading.moves import JOINS, MOVES, joined, sizes_of
from flatjax.layers.reading.program import Origins, Program, called


class Mixed(NamedTuple):
    """An array made of a kernel in which its axes are no longer apart."""

    by: str
    """The operation that mixed them."""
    with_constant: tuple[Reading, ...] = ()


class Use(NamedTuple):
    """A place where a kernel meets data."""

    by: str
    """The name of the operation."""
    readings: tuple[Reading, ...]
    """What it may take the kernel's axes for; none where that cannot be seen."""
    place: tuple[int, ...]
    """The number of the equation, after those of the calls and loops that it lies in."""
    equation: JaxprEqn
    operand: int
    """The number of the operand that holds the kernel."""
    read: Read | Mixed


class Uses(NamedTuple):
    """All that a program does with a kernel."""

    of_data: tuple[Use, ...]
    of_parameters: tuple[Use, ...]
    """Products with other parameters, which say something only where no data is met."""

    @property
    def telling(self) -> tuple[Use, ...]:
        return self.of_data or self.of_parameters


def uses_of(program: Program, path: str) -> Uses:
    """Finds the uses of a parameter in a loss."""
    jaxpr = program.traced.jaxpr
    kernel = jaxpr.invars[program.places[path]]
    uses, _ = _Follower(sizes_of(kernel)).follow(jaxpr, {kernel: Read.whole(sizes_of(kernel))}, program.origins)
    return uses


Made = Read | Mixed


class _Step(NamedTuple):
    """What the results of an equation are made of, and what it tells."""

    results: Mapping[int, Made]
    uses: tuple[Use, ...] = ()
    of_parameters: tuple[Use, ...] = ()


class _Follower(NamedTuple):
    shape: tuple[int, ...]

    def follow(self, program: Jaxpr, made: dict[Var, Made], origins: Origins) -> tuple[Uses, list[Made | None]]:
        """The uses in a program some of whose variables are made of the kernel, and what its results are made of."""
        uses: list[Use] = []
        of_parameters: list[Use] = []
        for place, equation in enumerate(program.eqns):
            entering = {
                operand: made[value]
                for operand, value in enumerate(equation.invars)
                if isinstance(value, Var) and value in made
            }
            if not entering:
                continue
            step = self._step(equation, entering, origins)
            uses += [use._replace(place=(place, *use.place)) for use in step.uses]
            of_parameters += [use._replace(place=(place, *use.place)) for use in step.of_parameters]
            for result, value in step.results.items():
                # One number of a kernel, as a norm or a penalty is, tells nothing of its axes.
                if sizes_of(equation.outvars[result]):
                    made[equation.outvars[result]] = value
        results = [made.get(value) if isinstance(value, Var) else None for value in program.outvars]
        return Uses(tuple(uses), tuple(of_parameters)), results

    def _step(self, equation: JaxprEqn, entering: dict[int, Made], origins: Origins) -> _Step:
        name = equation.primitive.name
        reads = {operand: value for operand, value in entering.items() if isinstance(value, Read)}
        if not reads:
            return self._lost(equation, entering, origins)
        if name == "scan":
            return self._of_scan(equation, entering, origins)
        if name == "cond":
            return self._of_branches(equation, entering, origins)
        if called(equation) is not None:
            return self._of_call(equation, entering, origins)
        # In the order of what they tell: a product most, a move nothing yet, and what no rule follows is lost.
        operand, read = next(iter(reads.items()))
        if len(entering) == 1 and name in _PRODUCTS and (operand == 1 or name == "dot_general"):
            return self._of_product(equation, operand, read, origins)
        moved = MOVES[name](equation, operand, read, origins) if len(reads) == 1 and name in MOVES else None
        if moved is not None:
            return _Step(dict(enumerate(moved)))
        if len(reads) < len(entering):
            return self._lost(equation, entering, origins)
        if name in JOINS and not read.is_looked_up:
            whole = joined(equation, reads)
            if whole is not None and not self._meets_data(equation, origins):
                return _Step({0: whole})
        if name in _BY_ENTRY and not self._are_used_rows(equation, reads, origins):
            changed = self._by_entry(equation, reads, origins)
            if changed is not None:
                return _Step({0: changed})
        if name in _REDUCTIONS and len(reads) == 1 and not self._is_rows(read):
            return self._of_reduction(equation, operand, read, origins)
        return self._lost(equation, entering, origins)

    def _is_rows(self, read: Read) -> bool:
        """Whether it holds looked-up entries of which at most one axis is left: rows of a table, if no columns."""
        left = {run.axis for runs in read.axes for run in runs if run.axis is not None}
        return read.is_looked_up and sum(self.shape[axis] > 1 for axis in left) <= 1

    def _are_used_rows(self, equation: JaxprEqn, reads: Mapping[int, Read], origins: Origins) -> bool:
        """Whether rows of a table meet more than numbers that scale them."""
        if not any(map(self._is_rows, reads.values())):
            return False
        others = [value for operand, value in enumerate(equation.invars) if operand not in reads]
        return equation.primitive.name not in _LINEAR_BY_ENTRY or any(map(origins.is_data, others))

    def _by_entry(self, equation: JaxprEqn, reads: dict[int, Read], origins: Origins) -> Read | None:
        """Follows an operation entry by entry, which leaves the axes apart.

        With data, it must be linear in the kernel.
        """
        result = equation.outvars[0]
        if any(len(read.axes) != len(sizes_of(result)) for read in reads.values()):
            return None
        if origins.is_data(result):
            # What is not linear in the kernel, as max(w, x), is no product of it with data.
            name = equation.primitive.name
            places = [0] if name == "div" else [1, 2] if name == "select_n" else [0, 1]
            if name not in _LINEAR_BY_ENTRY or not all(operand in places for operand in reads) or len(reads) > 1:
                return None
        read = merged(list(reads.values()))
        if read is None:
            return None
        return read.broadcast(sizes_of(result), range(len(read.axes))).changed()

    def _of_reduction(self, equation: JaxprEqn, operand: int, read: Read, origins: Origins) -> _Step:
        """Follows a sum. One of products with data, entry by entry, is a product of matrices; others take axes away."""
        axes = equation.params["axes"]
        kept = [place for place in range(len(read.axes)) if place not in axes]
        summed = read.named(axes)
        if origins.is_data(equation.invars[operand]) and summed:
            if equation.primitive.name != "reduce_sum":
                return self._lost(equation, {operand: read}, origins)
            readings = self._readings(read, summed, (), read.named(kept))
            return _Step({}, (self._use(equation, operand, read, readings),))
        return _Step({0: read.changed()._replace(axes=tuple(read.axes[place] for place in kept))})

    def _of_product(self, equation: JaxprEqn, operand: int, read: Read, origins: Origins) -> _Step:
        roles = _PRODUCTS[equation.primitive.name](equation, operand, read, self.shape)
        other, is_chosen = equation.invars[1 - operand], origins.is_data(equation.invars[operand])
        meets_data = origins.is_data(other)
        if is_chosen and not meets_data and self._is_rows(read):
            return _Step({}, (self._use_of_rows(equation, operand, read),))
        readings = self._readings(read, roles.summed, roles.stacked, roles.free)
        if is_chosen and meets_data and not (roles.free or roles.stacked) and self._is_rows(read) and readings:
            # Rows of a table that are compared with data, or columns that data is multiplied with: it looks the same.
            readings = (*readings, *self._use_of_rows(equation, operand, read).readings)
        use = self._use(equation, operand, read, readings)
        # A matrix that data chooses is multiplied with parameters as any other is: that is no use of it yet.
        if meets_data or (is_chosen and not read.is_looked_up):
            return _Step({}, (use,))
        # A factor: what the whole that it is a factor of is multiplied along is asked of the uses to come.
        is_constant = not read.earlier and not origins.is_parameter(other)
        with_constant = readings if is_constant else read.with_constant
        mapped: Made = Mixed(equation.primitive.name, with_constant)
        if equation.primitive.name == "dot_general" and not read.is_looked_up:
            axes = _axes_of_factor(equation, operand, read, roles.summed)
            mapped = Read(axes, read.selected, False, (*read.earlier, *readings), with_constant)
        return _Step({0: mapped}, (), (use,))

    def _readings(
        self, read: Read, summed: Sequence[int], stacked: Sequence[int], free: Sequence[int]
    ) -> tuple[Reading, ...]:
        """What the axes are taken for by a sum of products over some of them; none if that cannot be told."""
        selected = read.selected_axes
        # Each axis must have one role, and each longer than one entry must have some: else the reading is a guess.
        groups = [set(summed), set(stacked), set(free), set(selected)]
        known = set().union(*groups)
        is_apart = sum(map(len, groups)) == len(known)
        missing = [axis for axis, size in enumerate(self.shape) if size > 1 and axis not in known]
        if not is_apart or missing:
            return ()
        if not summed:
            # Whole rows of a table are what is multiplied.
            return (Reading(tuple(sorted(selected))),) if self._is_rows(read) else ()
        stack = () if not free else tuple(sorted((*stacked, *selected)))
        return (Reading(tuple(sorted(summed)), stack),)

    def _lost(self, equation: JaxprEqn, entering: Mapping[int, Made], origins: Origins) -> _Step:
        """Follows an operation that mixes the axes: with data that is a use, and else not yet."""
        operand, value = min(entering.items(), key=lambda item: isinstance(item[1], Mixed))
        is_looked_up = isinstance(value, Read) and value.is_looked_up
        by = equation.primitive.name if isinstance(value, Read) else value.by
        if not (self._meets_data(equation, origins) or is_looked_up):
            return _Step({result: Mixed(by, value.with_constant) for result in range(len(equation.outvars))})
        if isinstance(value, Read) and self._is_rows(value):
            return _Step({}, (self._use_of_rows(equation, operand, value),))
        return _Step({}, (Use(by, value.with_constant, (), equation, operand, value),))

    def _use_of_rows(self, equation: JaxprEqn, operand: int, rows: Read) -> Use:
        """Rows that are looked up, and then used as they are, are what one-hot features would have given."""
        readings = (Reading(tuple(sorted(rows.selected_axes))),)
        return Use(equation.primitive.name, readings, (), equation, operand, rows)

    def _meets_data(self, equation: JaxprEqn, origins: Origins) -> bool:
        return any(map(origins.is_data, equation.invars))

    def _use(self, equation: JaxprEqn, operand: int, read: Read, readings: Sequence[Reading]) -> Use:
        # One that cannot be told is not told by those before it.
        possible = tuple(dict.fromkeys((*read.earlier, *readings))) if readings else read.with_constant
        return Use(equation.primitive.name, possible, (), equation, operand, read)

    def _of_call(self, equation: JaxprEqn, entering: dict[int, Made], origins: Origins) -> _Step:
        program = called(equation)
        assert program is not None
        if len(program.invars) != len(equation.invars):
            return self._lost(equation, entering, origins)
        inner = {
            program.invars[operand]: _entering(program.invars[operand], value) for operand, value in entering.items()
        }
        uses, results = self.follow(program, inner, origins.within(program, program.invars, equation.invars))
        return _Step(_known(results), uses.of_data, uses.of_parameters)

    def _of_branches(self, equation: JaxprEqn, entering: dict[int, Made], origins: Origins) -> _Step:
        uses: list[Use] = []
        of_parameters: list[Use] = []
        results: list[list[Made | None]] = []
        # Any branch may run, so what all of them tell is kept, and a result is followed only if all agree on it.
        for number, branch in enumerate(equation.params["branches"]):
            program, operands = branch.jaxpr, equation.invars[1:]
            inner = {program.invars[operand - 1]: value for operand, value in entering.items() if operand}
            found, made = self.follow(program, inner, origins.within(program, program.invars, operands))
            uses += [use._replace(place=(number, *use.place)) for use in found.of_data]
            of_parameters += [use._replace(place=(number, *use.place)) for use in found.of_parameters]
            results.append(made)
        agreed = [_agreed(each) for each in zip(*results, strict=True)]
        return _Step(_known(agreed), tuple(uses), tuple(of_parameters))

    def _of_scan(self, equation: JaxprEqn, entering: dict[int, Made], origins: Origins) -> _Step:
        """Follows a loop over steps.

        A stack is taken apart along its first axis, and what is carried must stay as it is.
        """
        program, params = equation.params["jaxpr"].jaxpr, equation.params
        first_carry = params["num_consts"]
        first_stack = first_carry + params["num_carry"]
        inner: dict[Var, Made] = {}
        unchanged: dict[int, Made] = {}
        looked_up: list[Use] = []
        for operand, value in entering.items():
            variable = program.invars[operand]
            if operand >= first_stack and isinstance(value, Read):
                value = value.selecting(0, Selection(variable, is_looked_up=False)).squeezed([0])
            elif first_carry <= operand < first_stack:
                # A carry that a step changes is another array at each step, and no part of the kernel any longer.
                result = operand - first_carry
                if program.outvars[result] is variable:
                    unchanged[result] = value
                elif isinstance(value, Read) and self._is_rows(value):
                    looked_up.append(self._use_of_rows(equation, operand, value))
                    continue
                else:
                    value = Mixed("scan", value.with_constant)
            inner[variable] = value
        within = origins.within_loop(program, equation.invars, first_carry, params["num_carry"])
        uses, results = self.follow(program, inner, within)
        made: dict[int, Made] = {
            result: Mixed("scan", value.with_constant) for result, value in enumerate(results) if value is not None
        }
        return _Step(made | unchanged, (*looked_up, *uses.of_data), uses.of_parameters)


# Operations entry by entry.

_LINEAR_BY_ENTRY = ("mul", "div", "neg", "select_n")
_BY_ENTRY = (
    *_LINEAR_BY_ENTRY, "add", "add_any", "sub", "max", "min", "rem", "pow", "integer_pow", "square", "abs", "sign",
    "exp", "exp2", "expm1", "log", "log1p", "sqrt", "rsqrt", "cbrt", "tanh", "logistic", "erf", "sin", "cos", "round",
    "floor", "ceil", "clamp", "nextafter", "is_finite", "eq", "ne", "lt", "le", "gt", "ge", "not", "and", "or",
)  # fmt: skip
_REDUCTIONS = ("reduce_sum", "reduce_max", "reduce_min", "reduce_prod", "reduce_and", "reduce_or")


# Products.


class _Roles(NamedTuple):
    """The axes of the kernel that a product sums over, takes one by one, and leaves."""

    summed: tuple[int, ...]
    stacked: tuple[int, ...]
    free: tuple[int, ...]


def _of_dot(equation: JaxprEqn, operand: int, read: Read, _: Sequence[int]) -> _Roles:
    contracted, batched = equation.params["dimension_numbers"]
    return _roles(read, contracted[operand], batched[operand])


def _of_ragged_dot(equation: JaxprEqn, _: int, read: Read, __: Sequence[int]) -> _Roles:
    numbers = equation.params["ragged_dot_dimension_numbers"]
    contracted, batched = numbers.dot_dimension_numbers
    return _roles(read, contracted[1], (*batched[1], *numbers.rhs_group_dimensions))


def _roles(read: Read, summed: Sequence[int], stacked: Sequence[int]) -> _Roles:
    free = [place for place in range(len(read.axes)) if place not in (*summed, *stacked)]
    return _Roles(read.named(summed), read.named(stacked), read.named(free))


def _of_convolution(equation: JaxprEqn, _: int, read: Read, shape: Sequence[int]) -> _Roles:
    """Reads the roles of axes in a convolution.

    Networks side by side are one convolution in as many groups, whose outputs are led by an axis of theirs.
    """
    out, *summed = equation.params["dimension_numbers"].rhs_spec
    groups, runs = equation.params["feature_group_count"], list(read.axes[out])
    stacked: list[int] = []
    while len(runs) > 1 and runs[0].axis is not None and runs[0].size == shape[runs[0].axis]:
        if groups % runs[0].size or runs[0].size == 1:
            break
        groups //= runs[0].size
        stacked.append(runs.pop(0).axis or 0)
    free = tuple(dict.fromkeys(run.axis for run in runs if run.axis is not None))
    return _Roles(read.named(summed), tuple(stacked), free)


_PRODUCTS: dict[str, Callable[[JaxprEqn, int, Read, Sequence[int]], _Roles]] = {
    "dot_general": _of_dot,
    "ragged_dot_general": _of_ragged_dot,
    "conv_general_dilated": _of_convolution,
}


def _axes_of_factor(equation: JaxprEqn, operand: int, read: Read, summed: Sequence[int]) -> Axes:
    """The axes of a product with another parameter, whose own axes stand for those that are summed over."""
    contracted, batched = equation.params["dimension_numbers"]
    taken = (*contracted[operand], *batched[operand])
    mine = [axis for place, axis in enumerate(read.axes) if place not in taken]
    others_taken = (*contracted[1 - operand], *batched[1 - operand])
    others = [size for place, size in enumerate(sizes_of(equation.invars[1 - operand])) if place not in others_taken]
    stand_in = [(Run(None, size), *(Run(axis, 1) for axis in summed)) for size in others]
    of_batch = [read.axes[place] for place in batched[operand]]
    return tuple((*of_batch, *mine, *stand_in) if operand == 0 else (*of_batch, *stand_in, *mine))


def _entering(variable: Var, value: Made) -> Made:
    """The array within a `jax.shard_map`, where it is a part of itself."""
    return value.resized(sizes_of(variable)) if isinstance(value, Read) else value


def _agreed(results: Sequence[Made | None]) -> Made | None:
    known = [result for result in results if result is not None]
    if not known:
        return None
    if all(result == results[0] for result in results):
        return results[0]
    return Mixed("cond", tuple(dict.fromkeys(each for result in known for each in result.with_constant)))


def _known(results: Iterable[Made | None]) -> dict[int, Made]:
    return {place: result for place, result in enumerate(results) if result is not None}
