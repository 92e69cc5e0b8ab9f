"""Where the tokens of a data set came from, in one line."""

from pathlib import Path

from data_pipeline.token_shards import TokenShards

SOURCES_SHOWN = 5


def describe_origin(directory: Path) -> str:
    """Documents, tokens and source files of a `tokenshard/1` directory as it is now; says so where it is gone."""
    try:
        shards = TokenShards(directory)
    except FileNotFoundError:
        return "no longer there"
    except ValueError as error:
        return f"cannot be read: {error}"
    names = list(dict.fromkeys(Path(unit["source"]).name for unit in shards.manifest["units"]))
    more = f" and {len(names) - SOURCES_SHOWN} more files" if len(names) > SOURCES_SHOWN else ""
    return (
        f"{shards.documents:,} documents, {shards.tokens:,} tokens, fingerprint {shards.fingerprint}, "
        f"from {', '.join(names[:SOURCES_SHOWN])}{more}"
    )
