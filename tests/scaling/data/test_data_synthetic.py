"""Sources of known entropy rate, against enumeration and against the true model's own score."""

import itertools
import math

import numpy as np
import pytest

from scaling.config import ConfigError, validate_section
from scaling.data import Stream, open_data
from scaling.data.chains import Chain, markov, random_walk
from scaling.data.grammar import grammar
from scaling.data.random_bits import Rows, bits, uniforms
from scaling.data.synthetic import make_source

MARKOV = dict(source="markov", vocab=5, order=3, tokens=20_000, document=50, seq=24)
WALK = dict(source="random_walk", vocab=200, degree=5.0, zipf=0.7, tokens=20_000, document=64, seq=24)
GRAMMAR = dict(source="grammar", vocab=8, depth=3, branching=2, rules=4, tokens=20_000, seq=24)
SOURCES = {"markov": MARKOV, "random_walk": WALK, "grammar": GRAMMAR}


def transition(chain):
    """The chain's dense matrix between states, built entry by entry."""
    states = chain.stationary_S.size
    matrix = np.zeros((states, states))
    for s in range(states):
        for e in range(chain.rows.begin_S[s], chain.rows.begin_S[s + 1]):
            matrix[s, (s * chain.vocab + chain.next_E[e]) % states] += chain.rows.prob_E[e]
    return matrix


def stationary_by_solving(matrix):
    """pi (P - 1) = 0 with sum(pi) = 1, as least squares."""
    n = len(matrix)
    system = np.vstack([matrix.T - np.eye(n), np.ones(n)])
    return np.linalg.lstsq(system, np.append(np.zeros(n), 1.0), rcond=None)[0]


@pytest.mark.parametrize(
    "chain",
    [markov(4, 1, 0.3, 0), markov(3, 3, 1.0, 1), random_walk(60, 4.0, 1.0, 0.5, 2)],
    ids=["first order", "third order", "walk"],
)
def test_stationary_distribution_and_rate_against_a_linear_solve(chain):
    matrix = transition(chain)
    assert np.allclose(matrix.sum(1), 1, atol=1e-12)
    pi = stationary_by_solving(matrix)
    # both solvers lose some digits to the conditioning of P - 1
    assert np.abs(pi - chain.stationary_S).max() < 1e-11
    rate = -sum(pi[s] * p * math.log(p) for s, row in enumerate(matrix) for p in row if p > 0)
    assert chain.conditional_entropies()[-1] == pytest.approx(rate, abs=1e-10)


def test_conditional_entropies_against_every_block():
    chain = markov(3, 2, 0.5, 4)
    probability = {}  # of every block of 1 to 4 tokens, from the definition
    for s, (a, b) in enumerate(itertools.product(range(3), repeat=2)):
        probability[a, b] = chain.stationary_S[s]
    for length in (3, 4):
        for block in itertools.product(range(3), repeat=length):
            state = block[-3] * 3 + block[-2]
            probability[block] = probability[block[:-1]] * chain.rows.prob_E[state * 3 + block[-1]]
    for a in range(3):
        probability[(a,)] = sum(probability[a, b] for b in range(3))
    entropy = [
        -sum(p * math.log(p) for block, p in probability.items() if len(block) == n) for n in range(1, 5)
    ]
    got = chain.conditional_entropies()
    assert got == pytest.approx([entropy[1] - entropy[0], entropy[2] - entropy[1]], abs=1e-12)
    assert entropy[3] - entropy[2] == pytest.approx(got[-1], abs=1e-12)  # more context tells no more


def test_uniform_walk_is_the_textbook_one():
    chain = random_walk(300, 6.0, 0.0, None, 0)
    degree = np.diff(chain.rows.begin_S)
    # weights are 1, or whole numbers where edges coincide
    simple = np.flatnonzero(np.isclose(chain.rows.prob_E, 1 / np.repeat(degree, degree)))
    assert simple.size > 0.8 * chain.next_E.size
    assert chain.facts["edges"] == chain.next_E.size // 2
    assert abs(degree.mean() - 6) < 0.2
    matrix = transition(chain)
    flow = chain.stationary_S[:, None] * matrix
    assert np.abs(flow - flow.T).max() < 1e-15  # reversible
    reached = np.linalg.matrix_power((matrix > 0).astype(float) + np.eye(300), 60)
    assert (reached > 0).all()  # in one piece


def test_zipf_makes_heavy_tails():
    flat, heavy = (np.diff(random_walk(500, 8.0, z, None, 0).rows.begin_S) for z in (0.0, 1.0))
    assert heavy.max() > 4 * flat.max()


@pytest.mark.parametrize("concentration", [None, 0.5])
def test_grammar_entropy_against_every_string(concentration):
    g = grammar(4, 2, 2, 2, concentration, 3)
    strings = np.array(list(itertools.product(range(4), repeat=g.length)))
    p = np.exp(g.log_prob(strings))
    assert p.sum() == pytest.approx(1, abs=1e-12)
    assert g.entropy() == pytest.approx(-(p[p > 0] * np.log(p[p > 0])).sum(), abs=1e-12)
    first = np.bincount(strings[:, 0], p)
    assert g.first_token_entropy() == pytest.approx(-(first[first > 0] * np.log(first[first > 0])).sum())
    # unambiguous: with equal probabilities every derivation is a string of its own
    if concentration is None:
        assert (p > 0).sum() == 4 * 2 * 2**2


def test_no_right_hand_side_stands_twice():
    g = grammar(6, 3, 2, 6, None, 0)  # every pair is used
    for right in g.right_lVMs:
        assert len({tuple(r) for r in right.reshape(-1, 2).tolist()}) == 36


def true_scores(source, tokens, seq):
    """Nats of the true model on every held-out row: sums and targets by row."""
    stream = Stream(tokens, seq, 1, 0, shuffle=False)
    nats, targets = [], []
    first = None if isinstance(source, Chain) else first_log_prob(source)
    for step in range(stream.samples_per_epoch):
        batch = stream.batch_at(step)
        row = np.append(batch["inputs"][0], batch["targets"][0, -1])
        cuts = [0, *(np.flatnonzero(batch["loss_mask"][0] == 0) + 1).tolist(), row.size]
        total = 0.0
        for b, e in itertools.pairwise(cuts):
            piece = row[None, b:e]
            if isinstance(source, Chain):
                total -= source.log_probs(piece).sum() if e - b > 1 else 0.0
            elif e - b > 1:
                assert e - b == source.length
                total -= source.log_prob(piece)[0] - first[piece[0, 0]]
        nats.append(total)
        targets.append(batch["loss_mask"].sum())
    return np.array(nats), np.array(targets)


def first_log_prob(g):
    """Log-probability of a document's first token, by following the first child down from the root."""
    p = np.full(g.vocab, 1 / g.vocab)
    for right, choice in zip(g.right_lVMs, g.choices, strict=True):
        below = np.zeros(g.vocab)
        for a in range(g.vocab):
            for r in range(right.shape[1]):
                below[right[a, r, 0]] += p[a] * choice.prob_E[a * right.shape[1] + r]
        p = below
    return np.log(p)


@pytest.mark.parametrize("name", SOURCES)
def test_the_true_model_scores_the_ideal_loss(name):
    """The mean over held-out rows must lie within 4 standard errors: by chance it does not once in 16,000."""
    cfg = {**SOURCES[name], "heldout_fraction": 0.5}
    dataset = open_data(cfg)
    nats, targets = true_scores(make_source(validate_section("data", cfg)), dataset.heldout, cfg["seq"])
    loss = nats.sum() / targets.sum()
    stderr = np.sqrt(((nats - loss * targets) ** 2).sum()) / targets.sum()
    assert stderr < 0.01 * loss  # so that 4 of them tell something
    assert abs(loss - dataset.ideal_loss) < 4 * stderr
    if name == "markov":  # its first targets have less context, and that is told apart here
        assert dataset.ideal_loss - dataset.entropy_rate > 4 * stderr
    if name == "random_walk":
        assert dataset.ideal_loss == dataset.entropy_rate


def test_ideal_loss_counts_contexts_as_the_stream_cuts_them():
    dataset = open_data(MARKOV)
    stream = Stream(dataset.heldout, MARKOV["seq"], 1, 0, shuffle=False)
    entropies = dataset.describe()["entropies"]
    costs = []
    for step in range(stream.samples_per_epoch):
        batch = stream.batch_at(step)
        for position, mask in zip(batch["positions"][0], batch["loss_mask"][0], strict=True):
            if mask:
                costs.append(entropies[min(position, 2)])
    assert dataset.ideal_loss == pytest.approx(np.mean(costs), abs=1e-12)


@pytest.mark.parametrize("name", SOURCES)
def test_drawn_once_for_a_seed_and_apart_for_train_and_heldout(name, monkeypatch, tmp_path):
    first = open_data(SOURCES[name])
    monkeypatch.setenv("SCALING_CACHE", str(tmp_path / "another"))
    again, other = open_data(SOURCES[name]), open_data({**SOURCES[name], "seed": 1})
    assert first.fingerprint == again.fingerprint != other.fingerprint
    assert np.array_equal(first.train.shards[0], again.train.shards[0])
    assert first.vocab == SOURCES[name]["vocab"] and first.train.shards[0].max() < first.vocab
    documents = [first.train.document(d).tobytes() for d in range(first.train.documents)]
    held = {first.heldout.document(d).tobytes() for d in range(first.heldout.documents)}
    if name != "grammar":  # documents of 8 tokens do come up twice by chance
        assert not held & set(documents) and len(set(documents)) == len(documents)
    total = len(first.train) + len(first.heldout)
    assert total <= 20_000 and total > 20_000 - 64
    assert abs(len(first.heldout) / total - 0.05) < 0.005


def test_known_rates_are_carried_to_the_manifest_and_unknown_ones_are_not(text_folder):
    from launch.planning import data_facts

    dataset = open_data(WALK)
    facts = data_facts(dataset, WALK["seq"])
    assert facts["entropy_rate"] == dataset.entropy_rate == facts["describe"]["entropy_rate"]
    text = open_data({"source": "text", "path": str(text_folder), "heldout_fraction": 0.2})
    assert text.entropy_rate is None and text.ideal_loss is None
    assert set(data_facts(text, 8)) == {
        "fingerprint", "vocab", "unique_tokens", "heldout_tokens", "bytes_per_token", "describe",
    }  # fmt: skip


def test_draws_follow_their_probabilities():
    rows = Rows(np.array([0, 2, 5]), np.array([1.0, 3.0, 0.0, 2.0, 2.0]))
    entry = rows.draw(np.repeat([0, 1], 40_000), bits(0, "test", 80_000))
    share = np.bincount(entry, minlength=5) / 40_000
    assert share[2] == 0
    # 5 standard deviations of a share of 40,000 draws
    assert np.abs(share - [0.25, 0.75, 0, 0.5, 0.5]).max() < 5 * 0.5 / 200
    assert rows.entropies()[1] == pytest.approx(math.log(2))


def test_uniforms_are_uniform_and_restart_anywhere():
    u = uniforms(3, "x", 10_000)
    assert u.min() > 0 and u.max() < 1 and abs(u.mean() - 0.5) < 5 * 0.289 / 100
    assert np.array_equal(uniforms(3, "x", 10, first=500), u[500:510])
    assert not np.array_equal(uniforms(4, "x", 10), u[:10])


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({**GRAMMAR, "seq": 20}, "multiple of data.branching"),
        ({**GRAMMAR, "rules": 9}, "data.rules is 9"),
        ({**GRAMMAR, "branching": 30}, "data.branching is 30"),
        ({**GRAMMAR, "depth": 21}, "data.depth is 21"),
        ({**WALK, "degree": 1.0}, "data.degree is 1.0"),
        ({**WALK, "degree": 200.0}, "data.degree is 200"),
        ({**MARKOV, "order": 12}, "data.order is 12"),
        ({**MARKOV, "tokens": 60}, "data.tokens is 60"),
        ({**MARKOV, "degree": 4.0}, "data.degree is 4.0 with data.source = 'markov'"),
        ({"source": "stdlib", "order": 2}, "data.order is 2 with data.source = 'stdlib'"),
    ],
)
def test_bad_settings_are_named(change, said):
    with pytest.raises(ConfigError, match=said):
        open_data(change)
