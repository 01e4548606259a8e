"""The whole pipeline on a device that refuses the CPU's tensors; what each step waits for.

No GPU is needed: see pretend_gpu.py. Seven faults that only a GPU shows are planted as well.
"""

import inspect
from collections import Counter

import pretend_gpu
import pytest
import torch
from helpers import fill_adapter, quantize_model, tiny_llama
from pretend_gpu import PretendGPU
from test_train import command, preference_rows, write_rows

from dpo_minimal import batches, generate, llama, loop, lora, nf4, run
from dpo_minimal.batches import Order, pair_batch
from dpo_minimal.data import EncodedPair
from dpo_minimal.extras import plots, report
from dpo_minimal.formats import safetensors
from dpo_minimal.loss import dpo_loss, preference_logps

pytestmark = [
    pytest.mark.skipif(pretend_gpu.register is None, reason="this torch has no devices in Python"),
    pytest.mark.skipif(torch.cuda.is_available(), reason="there is a real GPU"),
]
PAIRS = [EncodedPair([1, 2, 3], [4, 5, 6], [7, 8]), EncodedPair([1, 2], [4], [7, 8, 3, 9])]
FEW = ["--batch-size", 2, "--grad-accum", 1, "--max-length", 96, "--max-steps", 1]


def policy(device, dtype=torch.float32, dropout=0.0, **switches):
    """A small 4-bit model with a trained adapter and a new one, as DPO begins."""
    model = quantize_model(tiny_llama(dtype, **switches))
    lora_settings = dict(r=2, dropout=dropout, targets="all")
    lora.add_adapter(model, "sft", **lora_settings)
    fill_adapter(model, "sft")
    model.to(device)
    torch.manual_seed(3)
    lora.add_adapter(model, "dpo", **lora_settings)
    return model.train()


def objective(model, batch):
    """The loss of each pair, against a policy that is its own reference."""
    chosen, rejected = preference_logps(model, batch)
    return dpo_loss(chosen, rejected, chosen.detach(), rejected.detach(), beta=0.1)[0], {}


def one_step(device, dtype=torch.float32, checkpointing=False):
    """Losses and all gradients of a batch, as CPU tensors."""
    model = policy(device, dtype)
    model.gradient_checkpointing = checkpointing
    nf4.keep_weights(model, checkpointing)
    losses, _ = objective(model, pair_batch(PAIRS, [0, 1], device))
    losses.sum().backward()
    grads = [p.grad.cpu() for p in model.parameters() if p.requires_grad]
    return [losses.detach().cpu(), *grads]


def steps(device, folder, resume=False, stop_in=None, dropout=0.5, snapshot=list):
    """The weights after 3 steps of the training loop, as CPU tensors; or stop in one of them."""
    model, asked, drawn = policy(device, dropout=dropout, num_hidden_layers=1), [], []

    def collate(rows):
        snapshot()
        drawn.append(rows)
        if len(drawn) == stop_in:
            asked.append("please")
        return pair_batch(PAIRS, rows, device)

    stage = loop.Stage("dpo", objective, Order(list, 2, 2, 0), collate)
    folder.mkdir(exist_ok=True)
    settings = loop.Settings(1e-2, batch_size=2, epochs=5, max_steps=3)
    loop.train(model, stage, settings, folder, resume, asked)
    return [p.detach().cpu() for p in model.parameters() if p.requires_grad]


def sampled(device):
    """Two answers of five tokens."""
    model = policy(device).eval()
    rows = [[1, 2, 3], [4, 5]]
    chooser = generate.make_chooser(top_p=0.9, seed=0)
    return generate.sample(model, rows, 5, -1, chooser)


def same(ours, others):
    """Whether two lists of tensors are the same bits."""
    return all(torch.equal(a, b) for a, b in zip(ours, others, strict=True))


# --- the device itself ------------------------------------------------------------------------


def test_the_device_refuses_what_a_gpu_refuses_and_is_gone_afterwards():
    with PretendGPU() as gpu:
        x = torch.ones(3, device=gpu.name)
        with pytest.raises(RuntimeError, match="two devices"):
            x + torch.ones(3)
        with pytest.raises(RuntimeError, match="numpy"):
            x.numpy()
        assert (x + torch.tensor(1.0)).tolist() == [2, 2, 2]  # a number may go along
        torch.manual_seed(0)
        on_cpu = torch.rand(3)
        torch.manual_seed(0)
        torch.rand(2, device=gpu.name)
        assert torch.equal(torch.rand(3), on_cpu)  # the CPU's numbers are its own
    assert not torch.cuda.is_available()
    with pytest.raises(RuntimeError, match="switched off"):
        x + x


def test_launches_and_waits_are_counted_by_hand():
    with PretendGPU() as gpu:
        x = torch.tensor([1.0, 0.0, 2.0], device=gpu.name)  # a copy, for which the host waits
        y = (x.view(3, 1).t() * 2).exp()  # two launches; views are free
        y.sum().item()
        assert len(x[x > 0]) == 2
        x.nonzero()
        bool((y > 1).all())
    assert gpu.launches["mul"] == gpu.launches["exp"] == gpu.launches["sum"] == 1
    assert "view" not in gpu.launches and "t" not in gpu.launches
    by_name = Counter()
    for place, times in gpu.waits.items():
        assert place.startswith("test_pretend_gpu.py:")
        by_name[place.split()[1]] += times
    assert by_name == {"_to_copy": 1, "_local_scalar_dense": 2, "index": 1, "nonzero": 1}


# --- the same bits ----------------------------------------------------------------------------


@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_step_on_the_gpu_has_the_cpus_bits_in_float32(checkpointing):
    with PretendGPU() as gpu:
        found = one_step(gpu.name, checkpointing=checkpointing)
    assert same(found, one_step("cpu", checkpointing=checkpointing))


def test_a_step_in_bfloat16_is_the_cpus_up_to_rounding():
    # Not to the bit: attention computes in float32 on a CPU, and in 16 bits on a GPU.
    with PretendGPU() as gpu:
        found = one_step(gpu.name, torch.bfloat16)
    for ours, other in zip(found, one_step("cpu", torch.bfloat16), strict=True):
        assert (ours - other).norm() <= 0.15 * other.norm()  # 7% were seen; weights are large here


def test_answers_are_the_cpus():
    with PretendGPU() as gpu:
        assert sampled(gpu.name) == sampled("cpu")


def test_a_resumed_run_goes_on_to_the_same_bits_with_dropout(tmp_path):
    with PretendGPU() as gpu:
        resume(gpu.name, tmp_path)


def files_of(folder):
    """{name: bytes} of the weights and samples that a run leaves."""
    names = [p for p in folder.rglob("*") if p.is_file()]
    kept = [p for p in names if p.suffix == ".safetensors" or p.name == "samples.md"]
    return {str(p.relative_to(folder)): p.read_bytes() for p in kept}


def test_a_run_of_all_stages_leaves_the_cpus_files(tmp_path, model_folder, monkeypatch):
    data = write_rows(tmp_path / "pairs.jsonl", preference_rows(44))
    held_out = write_rows(tmp_path / "held.jsonl", preference_rows(44)[:2])
    monkeypatch.setattr(run, "check_flags", lambda args: None)  # it knows cpu, cuda, mps
    monkeypatch.setattr(plots, "draw_curves", lambda *args: None)  # drawing takes seconds
    compare = report.compare

    def short(*args, **options):
        return compare(*args, **options | {"max_new_tokens": 2})

    monkeypatch.setattr(report, "compare", short)
    usual = ["--model", model_folder, "--data", data, "--eval-data", held_out, *FEW]
    usual += ["--lora-dropout", 0, "--dtype", "float32"]
    command(*usual, "--device", "cpu", "--out", tmp_path / "cpu")
    with PretendGPU() as gpu:
        command(*usual, "--device", gpu.name, "--out", tmp_path / "gpu")
    assert sum(gpu.launches.values()) > 1_000
    ours, others = files_of(tmp_path / "gpu"), files_of(tmp_path / "cpu")
    assert len(ours) >= 4 and ours.keys() == others.keys()
    assert [name for name in ours if ours[name] != others[name]] == []


# --- waits ------------------------------------------------------------------------------------


def waits_of_a_step(gpu, folder):
    """{"file operation": times} of what the host waits for in one training step of one batch."""
    seen = []
    steps(gpu.name, folder, snapshot=lambda: seen.append(gpu.waits.copy()))
    waits = Counter()
    for place, times in (seen[2] - seen[1]).items():
        file, operation = place.split(":")[0], place.split()[1]
        waits[f"{file} {operation}"] += times
    return waits


def test_how_often_a_training_step_waits_for_the_gpu(tmp_path):
    with PretendGPU() as gpu:
        waits = waits_of_a_step(gpu, tmp_path)
    # Five tensors of a batch, the loss and the gradient's norm for the log, the places of scored
    # tokens before the forward pass, and their number in backward. A real step logs 7 metrics more.
    assert waits == {
        "batches.py _to_copy": 5,
        "loop.py _local_scalar_dense": 2,
        "loss.py nonzero": 1,
        "loop.py masked_scatter_backward": 1,
    }


# --- planted faults ---------------------------------------------------------------------------


def plant(patch, module, name, old, new):
    """Replace text in a function of a module, as if it had been written so."""
    source = inspect.getsource(getattr(module, name))
    assert old in source, f"{module.__name__}.{name} no longer has {old!r}: plant it elsewhere"
    scope = {}
    exec(compile(source.replace(old, new), module.__file__, "exec"), vars(module), scope)
    patch.setattr(module, name, scope[name])


def save(device, folder):
    """Save a tensor of the device."""
    tensor = torch.ones(2, device=device)
    read = {"x": tensor}.__getitem__
    safetensors.write_safetensors(folder / "x.safetensors", {"x": (2,)}, torch.float32, read)


def resume(device, folder):
    """A run in two parts is the run in one."""
    whole = steps(device, folder / "whole")
    with pytest.raises(KeyboardInterrupt):
        steps(device, folder / "cut", stop_in=2)
    assert same(steps(device, folder / "cut", resume=True), whole), "the resumed run differs"


def train_a_step(device, folder):
    one_step(device)


def sample_some(device, folder):
    sampled(device)


# What a function of ours has, what stands there with the fault, and who notices.
FAULTS = {
    "frequencies": (llama, "rotary_table", ", positions.device)", ")", train_a_step),
    "adapter": (lora, "add_adapter", "adapter.to(", "(lambda device: adapter)(", train_a_step),
    "byte table": (nf4, "code_pairs", ".to(device)", "", train_a_step),
    "batches": (batches, "pad", ", device=device", "", train_a_step),
    "sampling tokens": (generate, "sample_steps", ".to(device)", "", sample_some),
    "safetensors": (safetensors, "write_safetensors", ".cpu()", "", save),
    "random state": (loop, "load_state", "torch.cuda.set_rng_state", "len", resume),
}


@pytest.mark.parametrize("name", FAULTS)
def test_a_planted_fault_is_noticed(name, monkeypatch, tmp_path):
    module, function, right, wrong, notice = FAULTS[name]
    with PretendGPU() as gpu:
        plant(monkeypatch, module, function, right, wrong)
        with pytest.raises((RuntimeError, AssertionError), match="two devices|numpy|differs"):
            notice(gpu.name, tmp_path)
