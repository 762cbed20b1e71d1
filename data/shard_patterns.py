"""Patterns that name several shards: `web-{000000..000127}.tar`."""


def expand_braces(pattern: str) -> list[str]:
    """The names that a pattern stands for, as webdataset has it."""
    from webdataset.shardlists import expand_urls  # here: it imports torch, which takes seconds

    return list(expand_urls(pattern)) if "{" in pattern else [pattern]
