"""Ragged paged-attention inputs with NaN in every place that must not be read.

Knows how a cache is laid out, and nothing about how attention is computed.
"""

from dataclasses import dataclass

import jax.numpy as jnp
import numpy as np


@dataclass(frozen=True, kw_only=True)
class Case:
    """One ragged batch: `queries[s]` new tokens of sequence s, `keys[s]` in all."""

    queries: tuple[int, ...]
    keys: tuple[int, ...]
    heads: int = 4
    kv_heads: int = 2
    head_dim: int = 64
    page_size: int = 16
    pages_per_seq: int = 6
    rows: int | None = None  # of query in all; None: 3 more than there are tokens
    bound: int | None = None  # max_query_length; None: the longest there is
    free_pages: int = 3
    free_before: int | None = None  # a window: what every query's window excludes becomes NaN
    seed: int = 0

    @property
    def max_query_length(self) -> int:
        return max(1, *self.queries) if self.bound is None else self.bound

    def arrays(self, dtype: str) -> tuple[jnp.ndarray, ...]:
        """query, key_pages, value_pages, block_tables, query_starts, kv_lengths."""
        random = np.random.default_rng(self.seed)
        seqs, size = len(self.queries), self.page_size
        used_pages = [-(-k // size) for k in self.keys]
        pages = sum(used_pages) + self.free_pages
        order = random.permutation(pages)
        shape = (pages, size, self.kv_heads, self.head_dim)
        key_pages, value_pages = np.full(shape, np.nan), np.full(shape, np.nan)
        # Unused entries name no page, or a page full of NaN.
        tables = random.choice([-7, order[-1], pages, 2**31 - 1], (seqs, self.pages_per_seq))
        for s, (queries, keys) in enumerate(zip(self.queries, self.keys, strict=True)):
            mine = order[sum(used_pages[:s]) :][: used_pages[s]]
            tables[s, : used_pages[s]] = mine
            first = 0
            if self.free_before is not None:
                first = max(0, keys - queries - self.free_before + 1)
                tables[s, : first // size] = pages + 5
            for p in range(first, keys):
                shape = (2, self.kv_heads, self.head_dim)
                new = random.standard_normal(shape)
                key_pages[mine[p // size], p % size] = new[0]
                value_pages[mine[p // size], p % size] = new[1]
        starts = np.concatenate([[0], np.cumsum(self.queries)])
        tokens = int(starts[-1]) + 3 if self.rows is None else self.rows
        query = random.standard_normal((tokens, self.heads, self.head_dim))
        query[starts[-1] :] = np.nan
        return (
            jnp.asarray(query, dtype),
            jnp.asarray(key_pages, dtype),
            jnp.asarray(value_pages, dtype),
            jnp.asarray(tables, jnp.int32),
            jnp.asarray(starts, jnp.int32),
            jnp.asarray(self.keys, jnp.int32),
        )


def by_hand(case: Case, arrays, *, scale, window=None, soft_cap=None, sinks=None):
    """Attention in NumPy float64, one query and one head at a time; the suite's oracle."""
    query, key_pages, value_pages, tables, starts, _ = (np.asarray(a, np.float64) for a in arrays)
    tokens, heads, head_dim = query.shape
    output, log_sum_exp = np.zeros((tokens, heads, head_dim)), np.full((tokens, heads), -np.inf)
    for s, (queries, keys) in enumerate(zip(case.queries, case.keys, strict=True)):
        for i in range(queries):
            position, token = keys - queries + i, int(starts[s]) + i
            first = 0 if window is None else max(0, position - window + 1)
            seen = range(first, position + 1)
            where = [(int(tables[s, p // case.page_size]), p % case.page_size) for p in seen]
            for h in range(heads):
                kv = h // (heads // case.kv_heads)
                k = np.array([key_pages[page, slot, kv] for page, slot in where])
                v = np.array([value_pages[page, slot, kv] for page, slot in where])
                scores = k @ query[token, h] * scale
                if soft_cap is not None:
                    scores = soft_cap * np.tanh(scores / soft_cap)
                weights = np.exp(scores)
                total = weights.sum() + (0 if sinks is None else np.exp(float(sinks[h])))
                output[token, h] = weights @ v / total
                log_sum_exp[token, h] = np.log(total)
    return output, log_sum_exp
