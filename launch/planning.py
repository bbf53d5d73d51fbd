"""From a study's settings to its manifest: the data is opened, nothing is written."""

from __future__ import annotations

from collections.abc import Mapping

from scaling.config import validate_section
from scaling.data import Mixture, first_repeat, open_data
from scaling.grid import plan


def manifest_of(settings: Mapping) -> dict:
    """The manifest that a study's settings (``scaling.study.load_study``) resolve into.

    Raises:
      ConfigError, StudyError: data that is not there, or a grid of which nothing can be trained.
    """
    return plan(settings, facts_of(settings))


def facts_of(settings: Mapping) -> dict:
    """What a plan needs to know of a study's data, which is opened; raises as ``manifest_of``.

    A trainer's study has none: {}.
    """
    if "trainer" in settings:
        return {}
    dataset = open_data(validate_section("data", settings["data"]))
    return data_facts(dataset, settings["data"].get("seq", 128))


def data_facts(dataset, seq: int) -> dict:
    """What the manifest keeps of a data set."""
    heldout = len(dataset.heldout)
    if isinstance(dataset.heldout, Mixture):  # as many as can be had in its proportions
        heldout = first_repeat(dataset.heldout, seq, "held-out") * seq + 1
    known = {"entropy_rate": dataset.entropy_rate, "ideal_loss": dataset.ideal_loss}
    return {
        "fingerprint": dataset.fingerprint,
        "vocab": dataset.vocab,
        "unique_tokens": first_repeat(dataset.train, seq) * seq,
        "heldout_tokens": heldout,
        "bytes_per_token": dataset.bytes_per_token,
        "describe": dataset.describe(),
        **{key: value for key, value in known.items() if value is not None},
    }
