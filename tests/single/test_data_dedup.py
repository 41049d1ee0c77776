"""Near-duplicates: found where documents resemble each other, and hardly elsewhere."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mpipar.data import dedup
from mpipar.data.dedup import NUM_BANDS, count_sharing, sketch


def text_of(rng: np.random.Generator, num_words: int) -> list[str]:
    return [f"word{n}" for n in rng.integers(0, 5000, num_words)]


def resemble(one: str, other: str) -> bool:
    sketches = sketch([one.encode(), other.encode()])
    return bool((sketches[0] == sketches[1]).any())


def with_similarity(rng: np.random.Generator, similarity: float, num_words: int = 800) -> tuple[str, str]:
    """Two texts of which a share of the shingles is the same: a common part, and parts of their own."""
    num_common = round(num_words * 2 * similarity / (1 + similarity))
    common = text_of(rng, num_common)
    return tuple(" ".join(common + text_of(rng, num_words - num_common)) for _ in range(2))  # type: ignore[return-value]


@pytest.mark.parametrize(("similarity", "expected"), [(0.05, 0.0), (0.3, 0.017), (0.5, 0.31), (0.65, 0.85), (0.8, 1.0)])
def test_the_chance_to_be_found(similarity: float, expected: float) -> None:
    rng = np.random.default_rng(7)
    num_pairs = 300
    found = sum(resemble(*with_similarity(rng, similarity)) for _ in range(num_pairs)) / num_pairs
    assert abs(found - expected) < 0.1 if 0.1 < expected < 0.9 else abs(found - expected) < 0.03


def test_small_edits_are_found_in_short_texts() -> None:
    rng = np.random.default_rng(8)
    for _ in range(50):
        words = text_of(rng, 200)
        edited = [*words[:50], "inserted", *words[50:-1]]
        assert resemble(" ".join(words), "\n\n".join(edited))


def test_unrelated_short_texts_are_not_found() -> None:
    rng = np.random.default_rng(9)
    sketches = sketch([" ".join(text_of(rng, num_words)).encode() for num_words in range(1, 1000)])
    assert (count_sharing(sketches, sketches) == 1).mean() > 0.999


@pytest.mark.parametrize("document", ["", "!!!", "one", "one two", "a b c d e", "déjà vu"])
def test_the_shortest_documents(document: str) -> None:
    assert resemble(document, document)
    assert not resemble(document, "x " + document[:-1])


@given(documents=st.lists(st.text("ab c\n!é", max_size=60).map(str.encode), min_size=1, max_size=12))
def test_a_sketch_does_not_depend_on_the_batch(documents: list[bytes]) -> None:
    whole = sketch(documents)
    assert whole.shape == (len(documents), NUM_BANDS)
    assert np.array_equal(whole, np.concatenate([sketch([document]) for document in documents]))


WORDS = st.sampled_from([*"ab _!\n\0\u00e9", "word ", "x" * 300, ", and "])


@pytest.mark.skipif(dedup._compiled() is None, reason="sketch.c was not compiled")
@given(documents=st.lists(st.lists(WORDS, max_size=40).map("".join).map(str.encode), min_size=1, max_size=5))
def test_what_is_compiled_gives_the_same_bits(documents: list[bytes]) -> None:
    compiled = dedup._compiled()
    assert compiled is not None
    assert np.array_equal(dedup._bins_in_c(compiled, documents), dedup._bins(documents))


def test_count_sharing() -> None:
    sketches = np.arange(5 * NUM_BANDS, dtype=np.uint64).reshape(5, NUM_BANDS)
    sketches[3, 7] = sketches[1, 7]
    expected = np.ones((2, NUM_BANDS))
    expected[0, 7] = 2
    assert np.array_equal(count_sharing(sketches[1:3], sketches), expected)
