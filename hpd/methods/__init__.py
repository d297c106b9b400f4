"""Terms with their supports and schedules, prefixes and strategy, and the table of named methods."""

from hpd.methods.table import METHODS, Method, choose_terms, method_terms, name_terms

__all__ = ["METHODS", "Method", "choose_terms", "method_terms", "name_terms"]
