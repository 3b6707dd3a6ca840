"""Say what to install where a package is missing that the diagnosis needs."""

from flatjax.core.optional import optional

for _name in ("tokenizers", "matplotlib", "tqdm", "tyro"):
    optional(_name, use="work on language models needs", extras="experiments,llm")
