"""The only entry for values: files, the command line and a sweep's samples, as dotted keys."""

from jebm.parser.arguments import (
    JobParser,
    add_trust,
    argument_parser,
    config_to_yaml,
    job_parser,
    load_config,
    parse,
    parse_arguments,
    trusted_names,
    word_or_class,
)
from jebm.parser.own_classes import with_own_classes
from jebm.parser.values import config_from_dict, override

__all__ = [
    "JobParser",
    "add_trust",
    "argument_parser",
    "config_from_dict",
    "config_to_yaml",
    "job_parser",
    "load_config",
    "override",
    "parse",
    "parse_arguments",
    "trusted_names",
    "with_own_classes",
    "word_or_class",
]
