"""Markov chains with a known entropy rate: dense ones of any order, and random walks on random graphs."""

from __future__ import annotations

import dataclasses

import numpy as np

from scaling.config import ConfigError
from scaling.data.random_bits import Rows, bits, gammas, plogp

_MOST_ENTRIES = 2**24
_FLOOR = 1e-3  # share of the uniform distribution in each row of a Markov chain: it can reach every state
_TOLERANCE = 1e-14
_MOST_ITERATIONS = 20_000


@dataclasses.dataclass(frozen=True, eq=False)
class Chain:
    """A stationary Markov chain; its state is the last ``order`` tokens, the oldest as the highest digit.

    Attributes:
      vocab: V, token ids are below it.
      order: k, tokens that decide the next one's distribution.
      rows: the next token's distribution in each of the V^k states.
      next_E: int64 [entries], the token that each entry of ``rows`` stands for.
      stationary_S: float64 [V^k], sums to 1.
      facts: counts for a report.
    """

    vocab: int
    order: int
    rows: Rows
    next_E: np.ndarray
    stationary_S: np.ndarray
    facts: dict

    def conditional_entropies(self) -> list[float]:
        """H(X_c+1 | X_1 .. X_c) in nats for c = 1 .. k, of the stationary chain; the last is the rate.

        The entropy of a block of c <= k tokens is that of the state's last c digits (chain rule; Cover and
        Thomas 2006, theorem 4.2.4 for the rate).
        """
        rate = float(self.stationary_S @ self.rows.entropies())
        block = [
            float(-plogp(self.stationary_S.reshape(-1, self.vocab**c).sum(0)).sum())
            for c in range(1, self.order + 1)
        ]
        return [*np.diff(block).tolist(), rate]

    def sample(self, documents: int, length: int, seed: int, purpose: str) -> np.ndarray:
        """int64 [documents, length]: independent documents, each from the stationary distribution on."""
        start = Rows(np.array([0, self.stationary_S.size]), self.stationary_S)
        zero_N = np.zeros(documents, np.int64)
        state_N = start.draw(zero_N, bits(seed, f"{purpose} start", documents))
        tokens_NL = np.empty((documents, length), np.int64)
        for t in range(min(self.order, length)):
            tokens_NL[:, t] = state_N // self.vocab ** (self.order - 1 - t) % self.vocab
        for t in range(self.order, length):
            random_N = bits(seed, f"{purpose} walk", documents, first=t * documents)
            tokens_NL[:, t] = self.next_E[self.rows.draw(state_N, random_N)]
            state_N = state_N * self.vocab % self.stationary_S.size + tokens_NL[:, t]
        return tokens_NL

    def log_probs(self, tokens_NL: np.ndarray) -> np.ndarray:
        """float64 [N, L - 1]: log-probability of every token but the first, given those before it."""
        tokens_NL = np.asarray(tokens_NL, np.int64)
        columns = []
        state_N = np.zeros(len(tokens_NL), np.int64)
        for t in range(tokens_NL.shape[1]):
            if t >= self.order:
                columns.append(self._log_next(state_N, tokens_NL[:, t]))
            elif t:
                longer, shorter = (self.stationary_S.reshape(-1, self.vocab**c).sum(0) for c in (t + 1, t))
                columns.append(np.log(longer[state_N * self.vocab + tokens_NL[:, t]] / shorter[state_N]))
            state_N = (state_N * self.vocab + tokens_NL[:, t]) % self.stationary_S.size
        return np.stack(columns, 1)

    def _log_next(self, state_N: np.ndarray, token_N: np.ndarray) -> np.ndarray:
        begin_S = self.rows.begin_S
        row_E = np.repeat(np.arange(begin_S.size - 1), np.diff(begin_S))
        place = np.searchsorted(row_E * self.vocab + self.next_E, state_N * self.vocab + token_N)
        return np.log(self.rows.prob_E[place])


def markov(vocab: int, order: int, concentration: float | None, seed: int) -> Chain:
    """A chain whose rows are drawn from a symmetric Dirichlet, mixed with a share of 0.001 of the uniform.

    Raises:
      ConfigError: the table of V^(k+1) probabilities is too large, or the chain mixes too slowly.
    """
    entries = vocab ** (order + 1)
    if entries > _MOST_ENTRIES:
        raise ConfigError(
            f"data.order is {order} with data.vocab = {vocab}: vocab^(order + 1) is {entries:.3g}; "
            f"it must be at most {_MOST_ENTRIES}"
        )
    states = vocab**order
    weight_SV = gammas(concentration, seed, "chain", entries).reshape(states, vocab)
    weight_SV = np.maximum(weight_SV, 1e-300)
    prob_SV = (1 - _FLOOR) * weight_SV / weight_SV.sum(1, keepdims=True) + _FLOOR / vocab
    rows = Rows(np.arange(states + 1, dtype=np.int64) * vocab, prob_SV.reshape(-1))
    return Chain(
        vocab, order, rows, np.tile(np.arange(vocab), states), _stationary(prob_SV, vocab), {"states": states}
    )


def _stationary(prob_SV: np.ndarray, vocab: int) -> np.ndarray:
    """The stationary distribution by power iteration on the chain of the last k tokens."""
    states = len(prob_SV)
    pi_S = np.full(states, 1 / states)
    for _ in range(_MOST_ITERATIONS):
        # the oldest token of (x_1 .. x_k, y) falls away: summed over, (x_2 .. x_k, y) is the next state
        after_S = (pi_S[:, None] * prob_SV).reshape(vocab, -1).sum(0)
        after_S /= after_S.sum()
        if np.abs(after_S - pi_S).sum() < _TOLERANCE:
            return after_S
        pi_S = after_S
    raise ConfigError(
        f"data: the chain does not settle in {_MOST_ITERATIONS} steps, so its entropy rate is not known; "
        "data.concentration must be larger"
    )


def random_walk(vocab: int, degree: float, zipf: float, concentration: float | None, seed: int) -> Chain:
    """A walk on a connected, undirected, weighted random graph of V nodes; the tokens are the nodes.

    A random cycle through all nodes keeps the graph in one piece; the other edges have their ends drawn
    with probability ~ (rank of the node)^-zipf (Chung and Lu 2002): a random graph of Erdos and Renyi at
    zipf = 0, heavy-tailed degrees above. Edge weights are gamma variates; double edges add up.

    The walk is reversible: it is at node i for a share pi_i = W_i / sum(W) of the time, W_i the weights at i
    together, and its entropy rate is sum_i pi_i H(w_i. / W_i) (Cover and Thomas 2006, section 4.3).

    Raises:
      ConfigError: the degree is impossible.
    """
    if vocab < 3 or not 2 <= degree <= vocab - 1:
        raise ConfigError(
            f"data.degree is {degree:g} with data.vocab = {vocab}; "
            "it must be from 2 to vocab - 1, of 3 nodes at least"
        )
    ring = np.argsort(bits(seed, "ring", vocab), kind="stable")
    extra = max(0, round(degree * vocab / 2) - vocab)
    ends = Rows(np.array([0, vocab]), np.arange(1, vocab + 1, dtype=np.float64) ** -zipf)
    pairs = ends.draw(np.zeros(2 * extra, np.int64), bits(seed, "edges", 2 * extra)).reshape(2, extra)
    a_E, b_E = np.concatenate([np.stack([ring, np.roll(ring, 1)]), pairs], axis=1)
    weight_E = gammas(concentration, seed, "weights", a_E.size)
    a_E, b_E, weight_E = (x[a_E != b_E] for x in (a_E, b_E, weight_E))  # no node steps onto itself
    directed, which = np.unique(np.concatenate([a_E * vocab + b_E, b_E * vocab + a_E]), return_inverse=True)
    weight_E = np.bincount(which, np.tile(weight_E, 2))
    from_E, to_E = np.divmod(directed, vocab)
    begin_S = np.searchsorted(from_E, np.arange(vocab + 1))
    stationary_S = np.bincount(from_E, weight_E, vocab)
    stationary_S /= stationary_S.sum()
    return Chain(
        vocab, 1, Rows(begin_S, weight_E), to_E, stationary_S, {"nodes": vocab, "edges": directed.size // 2}
    )
