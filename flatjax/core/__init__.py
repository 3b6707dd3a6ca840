"""The ground floor, which all rooms stand on: private by convention, so no public name lives here.

In reading order: `metric` (what every public function does around its formula), `arrays`, `integers` and `dtypes` (what
callers give), `sharding`, `trees`, `units`, `distances` and `double_word` (what formulas are computed with), `results`
(how records print).
"""
