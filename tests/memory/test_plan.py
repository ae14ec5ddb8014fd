"""What is planned: the choices for seven Macs, the command, runs that choose their sizes, and refusals."""

import json
import re
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path

import pytest

import mlx_loraplus as ml  # isort: skip  before mlx

from mlx_loraplus import plan
from mlx_loraplus.config import TrainConfig
from mlx_loraplus.device import SIMULATED, Machine, gb, on_gpu, simulate_mac, this_machine
from mlx_loraplus.memory.estimate import COEFFICIENTS, Coefficients, estimate
from mlx_loraplus.memory.measured import MeasuredStep
from mlx_loraplus.memory.plan import MemoryPlan, memory_plan_of
from mlx_loraplus.memory.plan_page import plan_headline
from mlx_loraplus.memory.plan_view import Plan
from mlx_loraplus.memory.run_sizes import (
    _does_not_fit,
    shortage,
)
from mlx_loraplus.models.known_models import gemma_for
from mlx_loraplus.models.skeleton import config_of
from mlx_loraplus.settings import configure
from mlx_loraplus.training import recorder
from tests.training.tiny_runs import Place

# GB: (gemma-3, its longest row of eight, batch at 1,024 tokens, checkpointing then, llama-3.1-8b at
# 8 x 512)
MACS = {
    8: ("gemma-3-1b-it", 1536, 4, True, "does not fit"),
    16: ("gemma-3-4b-it", 1536, 4, True, "fits with checkpointing"),
    24: ("gemma-3-12b-it", 960, 4, True, "fits with checkpointing"),
    36: ("gemma-3-12b-it", 2048, 4, True, "fits comfortably"),
    64: ("gemma-3-27b-it", 2304, 4, True, "fits comfortably"),
    128: ("gemma-3-27b-it", 5632, 4, False, "fits comfortably"),
    512: ("gemma-3-27b-it", 12_288, 16, False, "fits comfortably"),
}


def test_an_array_on_a_gpu_has_fewer_than_2_to_31_numbers():
    """The MLP of Llama 3.1 8B is 14,336 wide. Metal computes wrongly beyond that."""
    config = configure(TrainConfig, {"model": "llama-3.1-8b", "grad_checkpoint": "on"})
    mac = memory_plan_of(config, machine=simulate_mac("4096GB"))
    assert mac.largest_array(32, 4096) == 32 * 4096 * 14_336 < 2**31
    assert mac.fits(32, 4096)
    assert not mac.fits(64, 4096)
    assert mac.memory(64, 4096).total < mac.budget
    message = _does_not_fit(mac, 64, 4096)
    assert (
        "llama-3.1-8b does not fit: 64 rows x 4,096 tokens need an array of 3,758,096,384"
        in message
    )
    assert "3,758,096,384 elements, but on a GPU an array has at most 2,147,483,647" in message
    assert "--batch-size 32 --grad-accumulation-steps 2 (learns the same)" in message
    assert mac.most_rows(4096) == 36

    # Memory alone decides about checkpointing, and the page says what is too large.
    auto = replace(mac, config=replace(config, grad_checkpoint="auto"))
    assert not auto.checkpoint(64, 4096)
    planned = Plan(auto, 64, 4096, {}, [])
    lead = plan_headline(planned).lead
    assert lead == f"The batch does not fit: {auto.problem(64, 4096)}."
    assert "may be used" not in lead
    assert "it does not fit: 64 rows x 4,096 tokens need an array" in " ".join(str(planned).split())

    # Attention in chunks of 512 queries keeps scores; that of packed rows is one.
    packed = replace(mac, config=replace(config, data=replace(config.data, pack=True)))
    assert packed.largest_array(8, 32_768) == 8 * 32 * 512 * 32_768
    assert not packed.fits(8, 32_768)
    assert mac.fits(4, 32_768)

    # A CPU has no such limit.
    cpu = replace(mac, machine=replace(mac.machine, backend="cpu"))
    assert cpu.fits(64, 4096)


def test_a_measured_step_corrects_the_plan():
    config = configure(TrainConfig, {"model": "gemma-3-1b-it", "grad_checkpoint": "off"})
    planned = memory_plan_of(config, machine=simulate_mac("16GB"))
    before = planned.memory(4, 512)
    assert planned.corrected(None) is planned
    for factor in (0.8, 1.3):
        peak = before.arrays + int((factor - 1) * (before.activations + before.working))
        corrected = planned.corrected(MeasuredStep(4, 512, False, 1.0, peak))
        assert corrected.memory(4, 512).arrays == pytest.approx(peak, rel=1e-6)
        assert corrected.memory(4, 512).weights == before.weights
        assert (corrected.longest(4) > planned.longest(4)) is (factor < 1)
    tiny = planned.corrected(MeasuredStep(4, 512, False, 1.0, 0))
    assert tiny.memory(4, 512).working == pytest.approx(before.working / 2, rel=1e-6)


def test_seven_macs():
    config = configure(TrainConfig, {})
    found = {}
    for size in (8, 16, 24, 36, 64, 128, 512):
        machine = simulate_mac(f"{size}GB")
        fitting = memory_plan_of(config, machine=machine)
        rows = fitting.batch_size(1024)
        llama = memory_plan_of(replace(config, model="llama-3.1-8b"), machine=machine)
        found[size] = (
            fitting.config.model, fitting.longest(8), rows, fitting.checkpoint(rows, 1024), llama.verdict(8, 512),
        )  # fmt: skip
        comfortable = {
            name: trains_comfortably(memory_plan_of(replace(config, model=name), machine=machine))
            for name in ("gemma-3-27b-it", "gemma-3-12b-it", "gemma-3-4b-it", "gemma-3-1b-it")
        }
        assert gemma_for(machine.working_set) == next(
            name for name, well in comfortable.items() if well
        )
    assert found == MACS


def test_gemma_4_is_chosen_by_the_budget_that_later_checks_it():
    config = configure(TrainConfig, {})
    names = ("gemma-4-31b-it", "gemma-4-26b-a4b-it", "gemma-4-e4b-it")
    for size in (8, 16, 24, 36, 64, 128):
        machine = simulate_mac(f"{size}GB")
        chosen = next(
            (
                name
                for name in names
                if trains_comfortably(memory_plan_of(replace(config, model=name), machine=machine))
            ),
            "gemma-4-e2b-it",
        )
        assert gemma_for(machine.working_set, "gemma-4") == chosen, size


def trains_comfortably(fitting: MemoryPlan) -> bool:
    """Tell whether eight rows of 512 tokens take up to 70% of the working set."""
    return fitting.memory(8, 512, checkpoint=True).total <= 0.7 * fitting.machine.working_set


def test_the_machine_and_the_macs_it_plays(monkeypatch: pytest.MonkeyPatch):
    assert 0 < this_machine().budget <= this_machine().working_set < this_machine().memory
    assert (this_machine().cache(0) > 0) is on_gpu()
    monkeypatch.setenv(SIMULATED, "16GB")
    assert this_machine() == simulate_mac("16 gb")
    assert simulate_mac("16").working_set == 2 * 2**34 // 3
    assert simulate_mac("64GB").working_set == 48 * 2**30
    assert simulate_mac("16GB").cache(0) == 2 * 2**34 // 3 // 8
    assert simulate_mac("16GB").cache(2 * 2**34 // 3 - 5) == 5  # what is left
    for wrong in ("16MB", "0", "many", "1e9"):
        with pytest.raises(ml.ConfigError, match="is not the size of a Mac"):
            simulate_mac(wrong)


def test_the_command_answers_offline(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    arguments = ["--memory", "16GB", "--max-seq-length", "1024"]
    plan.main([*arguments, "--batch-size", "auto"])
    said = capsys.readouterr().out
    assert "gemma-3-4b-it, 4 rows x 1,024 tokens: fits with checkpointing" in said
    page = Path(__file__).parents[2] / "docs" / "memory.md"
    shown = "\n".join(line.rstrip() for line in said.splitlines())
    assert shown in page.read_text(encoding="utf-8")
    with pytest.raises(SystemExit) as stop:
        plan.main(["--memory", "lots"])
    assert stop.value.code == 2
    planned = ml.plan_memory(memory="16GB", batch_size=4, max_seq_length=1024)
    assert [line.strip() for line in str(planned).splitlines()] == [
        line.strip() for line in said.splitlines()
    ]
    assert "<svg" in planned._repr_html_(), "what a notebook shows"


def test_a_plan_is_a_page_too(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    page = tmp_path / "plan.html"
    words = ["--model", "gemma-3-4b", "--memory", "16GB", "--batch-size", "8"]
    plan.main([*words, "--max-seq-length", "8192", "--save-path", str(page)])
    said = capsys.readouterr().out
    assert said.endswith(f"the page is {page}\n")
    text = page.read_text()
    assert '<span class="state does-not-fit">does not fit</span>' in text
    for line in said.splitlines():
        if "to make it fit: " in line:
            assert line.partition(": ")[2] in text
    assert "--batch-size 1 --grad-accumulation-steps 8" in text, "the flags of a command"

    # An existing file is kept, and other suffixes are refused, before anything is planned.
    for path, told in ((page, "--overwrite"), (tmp_path / "plan.png", "must end in .html")):
        with pytest.raises(SystemExit) as stop:
            plan.main([*words, "--save-path", str(path)])
        assert stop.value.code == 2
        output = capsys.readouterr()
        assert told in output.err
        assert output.out == ""
    plan.main([*words, "--save-path", str(page), "--overwrite"])
    assert page.read_text() != text
    planned = ml.plan_memory("gemma-3-4b", memory="16GB")
    with pytest.raises(ml.OutputError, match="overwrite=True"):
        planned.save(page)


def test_a_short_name_of_an_unquantized_model_is_planned():
    assert list(ml.plan_memory(families="SmolLM2", memory="16GB").family) == ["smollm2-135m"]
    assert "smollm2-135m" not in ml.plan_memory(memory="16GB").family


def test_a_family_is_shown_whole_and_its_largest_that_fits_in_detail(
    capsys: pytest.CaptureFixture[str],
):
    plan.main(["qwen3.5", "gpt", "--memory", "32GB", "--max-seq-length", "512"])
    said = capsys.readouterr().out
    assert [line.split()[0] for line in said.splitlines()[2:9]] == [
        *(f"qwen3.5-{size}" for size in ("0.8b", "2b", "4b", "9b", "27b", "35b-a3b")), "gpt-oss-20b",
    ]  # fmt: skip
    assert "qwen3.5-35b-a3b 19.50 GB does not fit" in said
    assert "gpt-oss-20b, 8 rows x 512 tokens: fits with checkpointing" in said
    named = ml.plan_memory("gemma-3-1b", "32GB", families="Llama-3.2")
    assert named.title.startswith("gemma-3-1b, ")
    assert list(named.family) == ["llama-3.2-1b", "llama-3.2-3b"]
    with pytest.raises(
        ml.ConfigError, match=r"no short name contains 'qwen9' .did you mean 'qwen3"
    ):
        ml.plan_memory(families=("qwen", "qwen9"))


def test_a_plan_for_all_weights_names_no_adapters():
    planned = ml.plan_memory("smollm2-135m", "16GB", adapter="full", num_layers=1)
    assert list(planned.parts)[:2] == ["trained", "frozen"]
    assert sum(planned.parts.values()) == sum(vars(planned.memory).values())
    assert 0 < planned.parts["trained"] < planned.parts["frozen"]
    assert "adapters" not in str(planned)


def test_a_folder_needs_no_more_than_its_config(tmp_path: Path):
    (tmp_path / "config.json").write_text(json.dumps(config_of("gemma-3-1b")))
    alone, named = (
        ml.plan_memory(name, "16GB", batch_size=4) for name in (str(tmp_path), "gemma-3-1b")
    )
    assert (alone.memory, alone.family) == (named.memory, {})
    nothing = ml.plan_memory("llama-3.3-70b", "16GB", batch_size="auto", max_seq_length="auto")
    assert "1 row x 64 tokens: does not fit" in str(nothing)


def test_a_plan_names_flags_in_a_terminal_and_keywords_in_python(
    capsys: pytest.CaptureFixture[str],
):
    plan.main(["--model", "gemma-3-4b", "--memory", "16GB", "--max-seq-length", "8192"])
    said = capsys.readouterr().out
    assert "to make it fit: --" in said
    planned = str(ml.plan_memory("gemma-3-4b", "16GB", max_seq_length=8192))
    assert "to make it fit: batch_size=" in planned
    assert "--" not in planned


def test_a_run_chooses_its_sizes_and_says_so(place: Place):
    run = place.run(batch_size="auto", max_seq_length="auto", iters=1)
    assert isinstance(run.config.data.batch_size, int)
    assert run.config.data.batch_size == 16
    assert place.told_with("batch_size is 16")
    assert place.told_with("max_seq_length is")
    assert place.told_with("checkpointing is off")
    assert "batch_size: 16\n" in (run.folder / "run.yaml").read_text()


def test_a_run_says_that_its_plan_was_off(
    place: Place, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """The same run, planned with a coefficient that is far off and with the one that foretells its peak."""
    monkeypatch.setenv("MLX_LORAPLUS_CACHE", str(tmp_path))

    def run(parts: Coefficients) -> tuple[list[str], float]:
        """Run it in a process of its own: peaks count what other tests hold."""
        (tmp_path / COEFFICIENTS).write_text(json.dumps(asdict(parts)))
        folder = tmp_path / f"mlp {parts.mlp}"
        settings = {
            "model": place.folder / "model",
            "data": place.folder / "data",
            "adapter-path": folder,
        }
        words = [word for name, value in settings.items() for word in (f"--{name}", str(value))]
        command = [
            sys.executable,
            "-m",
            "mlx_loraplus.train",
            *words,
            "--iters",
            "1",
            "--batch-size",
            "40",
        ]
        told = subprocess.run(
            [*command, "--dropout", "0.1"], capture_output=True, text=True, check=True
        ).stdout
        peak = next(
            event["peak_memory_gb"] for event in ml.Run.load(folder).history if "loss" in event
        )
        return [line for line in told.splitlines() if "was predicted" in line], peak

    (line,), peak = run(Coefficients(mlp=3000))
    took, predicted = re.findall(r"([\d.]+) [MG]B", line)[:2]
    assert float(took) == pytest.approx(1e3 * peak, rel=0.05)  # MB
    assert float(predicted) > 0.01  # GB
    model, _ = ml.load(str(place.folder / "model"))
    config = configure(TrainConfig, {"dropout": 0.1})
    sizes = memory_plan_of(config, model).sizes

    def error(parts: Coefficients) -> float:
        return abs(
            estimate(sizes, config, 40, 24, checkpoint=False, parts=parts).total - 1e9 * peak
        )

    assert run(min((Coefficients(mlp=mlp) for mlp in range(60)), key=error))[0] == []


def test_the_peak_is_compared_with_the_plan_for_batches_as_they_run(
    place: Place, monkeypatch: pytest.MonkeyPatch
):
    shapes: list[tuple[int, int]] = []
    monkeypatch.setattr(
        recorder, "compare_with_plan", lambda *given, **_: shapes.extend(sorted(given[2]))
    )
    place.run(batch_size=30, grad_accumulation_steps=2, iters=1, compile="off")
    assert [rows for rows, _ in shapes] == [10, 30]  # the last batch has 10 of the 40 rows


def test_a_run_that_cannot_fit_is_refused_with_the_cheapest_ways(
    place: Place, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv(SIMULATED, "1GB")
    rows = place.folder / "data" / "train.jsonl"
    rows.write_text(300 * rows.read_text())
    with pytest.raises(
        ml.ConfigError,
        match=r"does not fit: 12,000 rows x 24 tokens take .* GB.*ways.*batch_size=\d+",
    ):
        place.run(batch_size=200_000)
    assert not (place.folder / "run" / "run.yaml").exists()


def test_one_block_takes_more_with_checkpointing_and_fits_without():
    fitting = memory_plan_of(
        configure(TrainConfig, {"model": "llama-3.2-1b", "num_layers": 1, "compile": "off"}),
        machine=simulate_mac("8GB"),
    )
    rows = fitting.most_rows(512)
    assert fitting.fits(rows, 512, checkpoint=False)
    assert not fitting.fits(rows, 512, checkpoint=True)
    assert not fitting.fits(rows + 1, 512, checkpoint=False)


@pytest.mark.parametrize("size", MACS)
def test_a_busy_mac_gets_the_same_model_and_a_warning(size: int):
    idle = simulate_mac(f"{size}GB")
    busy = replace(idle, free=int(0.1 * idle.memory))
    config = configure(TrainConfig, {})
    plan_idle, plan_busy = (memory_plan_of(config, machine=mac) for mac in (idle, busy))
    assert plan_busy.config.model == plan_idle.config.model == gemma_for(busy.budget)
    assert plan_busy.fits(8, 512), "what is chosen passes the check"
    assert plan_busy.budget == plan_idle.budget
    assert shortage(plan_idle, 8, 512) is None
    warning = shortage(plan_busy, 8, 512)
    assert warning is not None
    assert warning.startswith("warning: the run takes")
    assert f"only {gb(busy.free)} are free now" in warning


def test_a_run_on_a_busy_mac_warns_and_trains(place: Place, monkeypatch: pytest.MonkeyPatch):
    busy = replace(simulate_mac("16GB"), free=10**6)
    monkeypatch.setattr("mlx_loraplus.memory.plan.this_machine", lambda: busy)
    run = place.run(iters=1)
    assert run.finished
    warning = place.told_with("are free now")
    assert warning.startswith("warning: the run takes")
    assert "only 1.00 MB are free now: macOS makes room" in warning

    # A machine with room says nothing.
    monkeypatch.setattr("mlx_loraplus.memory.plan.this_machine", lambda: simulate_mac("16GB"))
    place.run("other", iters=1)
    assert not [line for line in place.told if "are free now" in line]


@pytest.mark.parametrize("backend", ["metal", "cuda", "cpu"])
def test_a_layer_that_holds_up_the_display_is_reported_on_a_mac_alone(
    backend: str, place: Place, monkeypatch: pytest.MonkeyPatch
):
    machine = replace(simulate_mac("16GB"), backend=backend)
    monkeypatch.setattr("mlx_loraplus.memory.plan.this_machine", lambda: machine)
    monkeypatch.setattr("mlx_loraplus.memory.display_advice._LONG_LAYER", 1.0)
    place.run(iters=1)
    advice = [line for line in place.told if "Impacting Interactivity" in line]
    assert len(advice) == (backend == "metal")
    assert all("a single layer may keep the GPU busy" in line for line in advice)


def test_without_metal_what_others_use_is_not_there():
    machine = Machine("cpu", memory=16 << 30, working_set=14 << 30, free=4 << 30)
    assert machine.budget == 4 << 30
    fitting = memory_plan_of(configure(TrainConfig, {"model": "gemma-3-12b"}), machine=machine)
    assert not fitting.fits(1, 64)
    assert shortage(fitting, 1, 64) is None
