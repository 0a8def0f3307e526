"""The split that a file's name tells of, as ``train-00000-of-00002.parquet`` tells of train."""

import fnmatch
import glob
import os
import re
from collections.abc import Iterable
from pathlib import Path

_HELD_OUT = {"test", "testing", "validation", "valid", "val", "dev", "eval", "evaluation", "heldout", "holdout"}
_WORDS = _HELD_OUT | {"train", "training"}
_SHARD = re.compile(r"(?P<name>.+?)[-_.](?P<index>\d{3,})-of-(?P<count>\d{3,})")


def patterns_by_split(names: Iterable[str]) -> dict[str, str]:
    """A pattern for the files of each split, training first; empty unless the names tell of several splits.

    Files whose names tell of no split are one of their own beside a held-out split.
    """
    by_split: dict[str, list[str]] = {}
    for name in names:
        by_split.setdefault(_split_of(name), []).append(name)
    told = sorted(split for split in by_split if split)
    if len(told) < 2 and not ("" in by_split and any(_words(split) & _HELD_OUT for split in told)):
        return {}
    everything = [name for names in by_split.values() for name in names]
    order = sorted(by_split, key=lambda split: (not split.startswith("train"), not split, split))
    return {split or "files without a split": _pattern(by_split[split], everything) for split in order}


def missing_shards(names: Iterable[str]) -> list[str]:
    """Names of shards that are absent, by their ``-00000-of-00002``."""
    present: dict[tuple[str, str], set[int]] = {}
    for name in names:
        if shard := _SHARD.match(name):
            present.setdefault((name[: shard.start("index")], shard["count"]), set()).add(int(shard["index"]))
    return [
        f"{begin}{index:0{len(count)}}-of-{count}"
        for (begin, count), indices in present.items()
        for index in range(int(count))
        if index not in indices
    ]


def _split_of(name: str) -> str:
    shard = _SHARD.match(name)
    stem = shard["name"] if shard else name
    words = _words(stem)
    if not words:
        return ""
    return stem if shard else min(words, key=stem.lower().index)


def _words(text: str) -> set[str]:
    return set(re.split(r"[^a-z]+", text.lower())) & _WORDS


def _pattern(names: list[str], everything: list[str]) -> str:
    """The shortest pattern that matches ``names`` and nothing else of ``everything``; else the names with commas."""
    begin = os.path.commonprefix(names)
    end = os.path.commonprefix([name[::-1] for name in names])[::-1]
    shards = [_SHARD.match(name) for name in names]
    suffix = "".join(Path(end).suffixes[-2:]) if "-of-" in end else end[end.find(".") :] if "." in end else end
    trimmed = re.sub(r"\d+$", "", begin)
    if shards[0] and all(shard and shard["name"] == shards[0]["name"] for shard in shards):
        trimmed = begin[: shards[0].end("name") + 1]
    elif len(names) == 1:
        return _literal(names[0])
    for first, last in ((trimmed, suffix), (trimmed, end), (begin, end)):
        pattern = f"{_literal(first)}*{_literal(last)}"
        if sorted(fnmatch.filter(everything, pattern)) == sorted(names):
            return pattern
    return ",".join(map(_literal, names))


def _literal(text: str) -> str:
    """A pattern that matches ``text``, without commas, which would make a list of it."""
    return glob.escape(text).replace(",", "?")
