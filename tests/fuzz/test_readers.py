"""Hostile bytes for every reader: by hand, from the corpus of earlier findings, and drawn at random around both."""

import json

import pytest
from conversions import SEEDS, spoiled
from readers import CORPUS, HARMLESS, HOSTILE, READERS, run

hypothesis = pytest.importorskip("hypothesis")
st = hypothesis.strategies

CASES = [(name, data) for name, cases in HOSTILE.items() for data in cases]
READ = {("adapter_json", 8), ("jsonl", 4), ("recipe", 6)}
"""Inputs that are harmless: what they hold is judged where it is used."""


@pytest.mark.parametrize(("name", "data"), CASES, ids=[f"{name} {number}" for number, (name, _) in enumerate(CASES)])
def test_hostile_bytes_are_one_line(name, data):
    message = run(name, data)
    if name not in ("conversion", "http") and (name, HOSTILE[name].index(data)) not in READ:
        assert message is not None


@pytest.mark.parametrize("name", HARMLESS)
def test_harmless_bytes_are_read(name):
    for data in HARMLESS[name]:
        assert run(name, data) is None, data


@pytest.mark.parametrize("format", SEEDS)
def test_files_of_every_format_are_read_and_spoiled_ones_are_refused(format):
    seed = SEEDS[format]
    assert run("conversion", seed) is None
    messages = [run("conversion", data) for data in spoiled(seed)[1:]]
    assert sum(message is not None for message in messages) >= len(messages) // 2  # the rest is harmless, by the format's own rules


@pytest.mark.parametrize("path", sorted(CORPUS.glob("*/*")), ids=lambda path: f"{path.parent.name}/{path.name}")
def test_what_a_fuzzer_found_stays_mended(path):
    run(path.parent.name, path.read_bytes())


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=8,
)
KINDS = ["LORA", "VERA", "DORATUNE", None]
FIELDS = [
    "peft_type",
    "r",
    "lora_alpha",
    "target_modules",
    "rank_pattern",
    "alpha_pattern",
    "use_dora",
    "modules_to_save",
    "weight_map",
]


@pytest.mark.parametrize("name", READERS)
@hypothesis.settings(max_examples=60, deadline=None, suppress_health_check=list(hypothesis.HealthCheck))
@hypothesis.given(data=st.data())
def test_changed_bytes_are_read_or_refused(name, data):
    base = data.draw(st.sampled_from([case[:2000] for case in (*HOSTILE[name], *HARMLESS.get(name, ()))]))
    cut, put = data.draw(st.integers(0, len(base))), data.draw(st.binary(max_size=6))
    run(name, base[:cut] + put + base[cut + data.draw(st.integers(0, 4)) :])


@hypothesis.settings(max_examples=150, deadline=None, suppress_health_check=list(hypothesis.HealthCheck))
@hypothesis.given(fields=st.dictionaries(st.sampled_from(FIELDS), JSON, max_size=6), kind=st.sampled_from(KINDS))
def test_any_values_in_an_adapters_fields(fields, kind):
    run("adapter_json", json.dumps({"peft_type": kind, "r": 2, "target_modules": ["q"]} | fields).encode())
    run("index", json.dumps({"weight_map": fields}).encode())
