"""`as_peft(model)`: PEFT's calls answered by doratune's functions, over the same modules."""

import copy
import pickle

import peft
import pytest
import torch
from conftest import randomize, tiny_gpt2, tiny_llama

import doratune
from doratune import AdapterConfig, UserError

IDS = torch.arange(3, 15)[None]
CONFIGS = {
    "dora": AdapterConfig(rank=2),
    "lora": AdapterConfig(method="lora", rank=2),
    "vera": AdapterConfig(method="dvora", rank=4),
    "input axis": AdapterConfig(rank=2, magnitude_axis="input"),
    "relative": AdapterConfig(rank=2, magnitude_form="relative"),
    "full gradient": AdapterConfig(rank=2, norm_gradient="full"),
    "trained whole": AdapterConfig(rank=2, targets=["q_proj"], also_train=["norm"]),
    "an embedding": AdapterConfig(rank=2, targets=["embed_tokens", "v_proj"]),
}


def logits(model, ids=IDS):
    with torch.no_grad():
        return model(ids).logits


def gradients(model, loss):
    model.zero_grad()
    loss.backward()
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("name", CONFIGS)
def test_a_reference_beside_the_policy(name):
    """Forward, then the reference, then backward: the gradients are those without a reference in between."""
    model = randomize(doratune.attach(tiny_llama(), CONFIGS[name]))
    view = doratune.as_peft(model).train()
    expected, trained = logits(view), [n for n, p in view.named_parameters() if p.requires_grad]
    alone = gradients(view, view(IDS, labels=IDS).loss)
    view.add_adapter("ref", view.peft_config["default"])
    with torch.no_grad():
        for p in view.parameters():
            if p.requires_grad:
                p.mul_(1.01)
        moved = logits(view)
    assert not torch.equal(moved, expected)
    view.set_adapter("ref")
    assert torch.equal(logits(view), expected)
    assert not any(p.requires_grad for p in view.parameters())
    view.set_adapter("default")
    assert torch.equal(logits(view), moved)
    with view.disable_adapter():
        assert torch.equal(logits(view), logits(tiny_llama()))
    with torch.no_grad():
        for p in view.parameters():
            if p.requires_grad:
                p.div_(1.01)
    loss = view(IDS, labels=IDS).loss
    view.set_adapter("ref")
    logits(view)
    view.set_adapter("default")
    with view.disable_adapter():
        logits(view)
    again = gradients(view, loss)
    assert trained == [n for n, p in view.named_parameters() if p.requires_grad]
    assert again.keys() == alone.keys()
    for key, grad in again.items():
        torch.testing.assert_close(grad, alone[key], rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("base", [tiny_llama, tiny_gpt2])
def test_weights_for_an_engine(name, base):
    """TRL's loop over a PeftModel: merge, read what is no adapter's under plain names, unmerge."""
    if base is tiny_gpt2 and name in ("trained whole", "an embedding"):
        pytest.skip("names of Llama")
    view = doratune.as_peft(randomize(doratune.attach(base(), CONFIGS[name])))
    before, expected = logits(view), doratune.merged_state_dict(view.get_base_model())
    view.merge_adapter()
    sent = {
        name.removeprefix("base_model.model.").replace(".base_layer", ""): p.detach().clone()
        for name, p in view.named_parameters()
        if view.prefix not in name and "original_module" not in name
    }
    view.unmerge_adapter()
    assert all(torch.equal(t, expected[key]) for key, t in sent.items())
    assert set(sent) == {n for n, _ in base().named_parameters()}
    engine = base()
    engine.load_state_dict(sent, strict=False)
    torch.testing.assert_close(logits(engine), before, rtol=1e-4, atol=1e-5)
    assert torch.equal(logits(view), before)


def test_the_state_dict_for_an_engine_while_training_goes_on():
    """`merged_state_dict` needs no merge: the live model trains on between two gatherings."""
    model, engine = doratune.attach(tiny_llama(), CONFIGS["dora"]), tiny_llama()
    optimizer = torch.optim.AdamW(doratune.parameter_groups(model, lr=1e-2))
    for _ in range(3):
        model(IDS, labels=IDS).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        engine.load_state_dict(doratune.merged_state_dict(model))
        torch.testing.assert_close(logits(engine), logits(model), rtol=1e-4, atol=1e-5)
        settings = {"max_new_tokens": 5, "do_sample": False}
        assert torch.equal(engine.generate(IDS, **settings), model.generate(IDS, **settings))


@pytest.mark.parametrize("name", CONFIGS)
def test_folders(name, tmp_path):
    view = doratune.as_peft(randomize(doratune.attach(tiny_llama(), CONFIGS[name])))
    view.add_adapter("ref")
    reference = logits(view)
    randomize(view, seed=4)
    expected = logits(view)
    view.save_pretrained(tmp_path)
    view.save_pretrained(tmp_path / "one", selected_adapters=["ref"])
    view.save_pretrained(tmp_path / "none", is_main_process=False)
    assert [p.name for p in (tmp_path / "one").iterdir()] == ["ref"]
    assert not (tmp_path / "none").exists()
    other = doratune.as_peft(doratune.attach(tiny_llama(), CONFIGS[name]))
    other.load_adapter(tmp_path, "default", is_trainable=True)
    other.load_adapter(tmp_path / "ref", "ref")
    assert torch.equal(logits(other), expected)
    other.set_adapter(["ref"])
    assert torch.equal(logits(other), reference)
    assert not any(p.requires_grad for p in other.parameters())
    other.load_adapter(tmp_path, "ref")  # values for one that is there
    assert torch.equal(logits(other), expected)
    other.set_adapter("default")
    other.load_adapter(tmp_path / "ref", "ref")  # and for one that is set aside
    assert torch.equal(logits(other), expected)
    other.delete_adapter("ref")
    assert other.active_adapters == ["default"]
    assert list(other.peft_config) == ["default"]


def test_mixed_batches_by_peft_s_argument():
    model = randomize(doratune.attach(tiny_llama(), CONFIGS["dora"], name="a"))
    randomize(doratune.attach(model, CONFIGS["lora"], name="b"), seed=2)
    view, ids = doratune.as_peft(model), IDS.expand(3, -1)
    rows = []
    for name in ("a", None, "b"):
        doratune.use(model, name)
        rows.append(logits(model))
    doratune.use(model, "a")
    torch.testing.assert_close(
        logits(lambda x: view(x, adapter_names=["a", "__base__", "b"]), ids), torch.cat(rows), rtol=1e-4, atol=1e-5
    )
    out = view.generate(ids, adapter_names=["a", "__base__", "b"], max_new_tokens=2, do_sample=False)
    assert out.shape == (3, IDS.shape[1] + 2)


def test_what_it_is_and_what_it_leaves_alone():
    model = randomize(doratune.attach(tiny_llama(), CONFIGS["dora"], name="style"))
    view = doratune.as_peft(model)
    assert isinstance(view, peft.PeftModel)
    assert doratune.as_peft(view) is view
    assert view.get_base_model() is model
    assert view.peft_config["default"].use_dora  # whatever trainers ask for is the one in use
    assert (view.config, view.dtype, view.active_adapter) == (model.config, model.dtype, "style")
    assert {id(p) for p in view.parameters()} == {id(p) for p in model.parameters()}
    assert view.get_nb_trainable_parameters()[0] == sum(p.numel() for p in model.parameters() if p.requires_grad)
    for name, p in view.named_parameters():
        assert view.get_parameter(name) is p
    assert doratune.verify(view).ok
    for twin in (copy.deepcopy(view), pickle.loads(pickle.dumps(view))):
        assert torch.equal(logits(twin), logits(view))
        randomize(twin, seed=8)
        assert not torch.equal(logits(twin), logits(view))
    assert view.unload() is model
    assert torch.equal(logits(model), logits(tiny_llama()))
    view = doratune.as_peft(randomize(doratune.attach(tiny_llama(), CONFIGS["dora"])))
    view.add_adapter("ref")
    expected = logits(view)
    plain = view.merge_and_unload()
    torch.testing.assert_close(logits(plain), expected, rtol=1e-4, atol=1e-5)
    doratune.attach(plain, CONFIGS["dora"])


def test_what_is_refused():
    with pytest.raises(UserError, match="no adapter is attached"):
        doratune.as_peft(tiny_llama())
    model = doratune.attach(tiny_llama(), CONFIGS["dora"])
    view = doratune.as_peft(model)
    for call, text in (
        (lambda: view.set_adapter("other"), "has no adapter 'other'; it has 'default'"),
        (lambda: view.set_adapter(["default", "other"]), r"one adapter is in use at a time: doratune\.combine"),
        (lambda: view.add_adapter("default"), "attached already, with an adapter 'default'"),
        (lambda: view.add_adapter("p", peft.PromptTuningConfig(num_virtual_tokens=2)), "a prompt beside a doratune adapter"),
        (lambda: view.delete_adapter("other"), "has no adapter 'other'"),
    ):
        with pytest.raises(UserError, match=text):
            call()
    doratune.merge(model)
    with pytest.raises(UserError, match=r"this model is merged; call doratune\.unmerge\(model\) before doratune\.as_peft"):
        doratune.as_peft(model)


@pytest.fixture
def _one_process():
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


@pytest.mark.usefixtures("_one_process")
def test_sharded_parameters_are_not_switched(tmp_path):
    from torch.distributed.fsdp import fully_shard

    mesh = torch.distributed.init_device_mesh("cpu", (1,))
    view = doratune.as_peft(randomize(doratune.attach(tiny_llama(), CONFIGS["dora"])))
    expected = logits(view)
    view.add_adapter("ref")
    fully_shard(view.get_base_model(), mesh=mesh)
    torch.testing.assert_close(logits(view), expected, rtol=1e-4, atol=1e-5)
    for call in (lambda: view.set_adapter("ref"), lambda: view.save_pretrained(tmp_path / "out")):
        with pytest.raises(
            UserError, match=r"sharded over processes, where it cannot be switched: .* precompute_ref_log_probs=True"
        ):
            call()
    with view.disable_adapter():  # asks no parameter to move
        torch.testing.assert_close(logits(view), logits(tiny_llama()), rtol=1e-4, atol=1e-5)
