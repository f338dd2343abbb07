"""Which configs are worth trying: values from `search_spaces/*.yaml`, legality from `flashgen.codegen.constraints`."""

from flashgen.search_space.space import LegalSpace, SearchSpace, load_space

__all__ = ["LegalSpace", "SearchSpace", "load_space"]
