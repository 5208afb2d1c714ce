"""What it costs to extrapolate quantized checkpoints, and what their rounding does to θ(α).

With --work, how long and in how much memory, in turn: `expo extrapolate --no-fsync` of a bfloat16 pair with Llama's
shapes, of the same pair with DPO in FP8 (blocks of 128×128), and with both sides so; transformers' dequantization with
the arithmetic in memory; then of a pair with the shapes of one layer of gpt-oss-20b, in bfloat16, and with DPO in
MXFP4. A ratio is the median over rounds of two runs side by side, with the range of these. Every weight of the FP8
output is compared with that of transformers, whose way is run in the first round alone.

With --models, what rounding does to the weights of a folder's sft and dpo (or tiny-sft and tiny-dpo), in float64:
‖noise‖ of a side that is stored so, against its own norm and that of Δ = θ_dpo − θ_sft, and how far θ(α) is from that
of the pair as it is.

With --trio, what rounding does to answers: `expo sweep` of a folder's sft and dpo, as the demo writes them, with rm,
then with DPO in FP8, and with both sides so; rewards above each pair's own α = 0, and above that of the pair as it is.

    python benchmarks/dequantize.py --work /tmp/expo-dequantize --rounds 5
    python benchmarks/dequantize.py --models models
    python benchmarks/dequantize.py --trio demo-output
"""

from __future__ import annotations

import argparse
import json
import math
import shutil
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
from extrapolate import ALPHA, PAIRS, Run, make_pair, measure, open_all, require_room
from safetensors.torch import load_file, save_file
from torch import Tensor

BLOCK = 128
LARGEST_FP8 = 448.0
ALPHAS = (0.0, 0.5, 1.0, 2.0)
SWEPT = (0.0, 0.5, 1.0, 2.0, 4.0)
EXPERTS = {"gate_up_proj": (32, 2880, 5760), "down_proj": (32, 2880, 2880)}
"""Of one layer of gpt-oss-20b, [experts, in, out]."""
FP4 = torch.tensor((0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0))

IN_MEMORY = "DPO in FP8, by transformers and in memory"

THEIRS = """
import sys, torch
from transformers import AutoModelForCausalLM, FineGrainedFP8Config
sft, dpo, alpha, output = sys.argv[1], sys.argv[2], float(sys.argv[3]), sys.argv[4]
s = AutoModelForCausalLM.from_pretrained(sft, dtype=torch.bfloat16)
said = FineGrainedFP8Config(dequantize=True)
d = AutoModelForCausalLM.from_pretrained(dpo, dtype=torch.bfloat16, quantization_config=said)
other = s.state_dict()
for name, weight in d.state_dict().items():
    torch.lerp(weight, other[name], -alpha, out=weight)
d.config.quantization_config = None
d.hf_quantizer = None
d._weight_conversions = []
d.save_pretrained(output)
"""

# --- quantizing ---------------------------------------------------------------------------------------------------


def in_fp8(weights: Tensor, block: int = BLOCK) -> tuple[Tensor, Tensor]:
    """A matrix in float8_e4m3fn, and its scales in float32; 0 as the block is one block for all."""
    rows, columns = weights.shape
    height, width = (block, block) if block else (rows, columns)
    down, across = -(-rows // height), -(-columns // width)
    wide = torch.zeros(down * height, across * width)
    wide[:rows, :columns] = weights
    blocks = wide.view(down, height, across, width)
    scales = blocks.abs().amax((1, 3)).clamp_min(1e-12) / LARGEST_FP8
    stored = (blocks / scales[:, None, :, None]).view(wide.shape)[:rows, :columns]
    return stored.to(torch.float8_e4m3fn).contiguous(), scales


def rounded_to_fp8(weights: Tensor, block: int = BLOCK) -> Tensor:
    """What becomes of a matrix."""
    stored, scales = in_fp8(weights.float(), block)
    height, width = (block, block) if block else weights.shape
    factors = scales.repeat_interleave(height, 0).repeat_interleave(width, 1)[: weights.shape[0], : weights.shape[1]]
    return (stored.float() * factors).bfloat16()


def rounded_to_mxfp4(weights: Tensor) -> Tensor:
    """What becomes of a matrix whose rows are cut into blocks of 32, each with the largest power of two that fits."""
    blocks = weights.float().view(weights.shape[0], -1, 32)
    power = torch.floor(torch.log2(blocks.abs().amax(-1, keepdim=True).clamp_min(1e-30))) - 2
    scaled = (blocks / power.exp2()).abs().clamp(max=6.0)
    nearest = FP4[(scaled[..., None] - FP4).abs().argmin(-1)]
    return (nearest.copysign(blocks) * power.exp2()).view(weights.shape).bfloat16()


# --- time and memory ----------------------------------------------------------------------------------------------


def fp8_copy(source: Path, folder: Path) -> Path:
    """A checkpoint with its linear layers in FP8, file for file."""
    if (folder / "config.json").exists():
        return folder
    folder.mkdir()
    for file in source.iterdir():
        if file.suffix in (".json", ".jinja", ".txt"):
            shutil.copy(file, folder)
    weight_map = {}
    for file in sorted(source.glob("*.safetensors")):
        found = {}
        for name, values in load_file(file).items():
            found[name] = values
            if name.endswith("proj.weight"):
                found[name], found[f"{name}_scale_inv"] = in_fp8(values.float())
        save_file(found, folder / file.name, {"format": "pt"})
        weight_map |= dict.fromkeys(found, file.name)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    said = {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [BLOCK, BLOCK]}
    config = json.loads((source / "config.json").read_text()) | {"quantization_config": said}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def experts_pair(work: Path) -> tuple[Path, Path, Path]:
    """SFT and DPO with the experts of one layer in bfloat16, and DPO in MXFP4, of random bytes."""
    sft, dpo, packed = (work / f"experts-{name}" for name in ("sft", "dpo", "mxfp4"))
    if (packed / "config.json").exists():
        return sft, dpo, packed
    for seed, folder in enumerate((sft, dpo)):
        folder.mkdir(exist_ok=True)
        generator = torch.Generator().manual_seed(seed)
        found = {f"experts.{name}": 0.02 * torch.randn(shape, generator=generator) for name, shape in EXPERTS.items()}
        save_file({name: values.bfloat16() for name, values in found.items()}, folder / "model.safetensors")
        (folder / "config.json").write_text("{}")
    packed.mkdir()
    generator, found = torch.Generator().manual_seed(2), {}
    for name, (count, inner, out) in EXPERTS.items():
        blocks, scales = (count, out, inner // 32, 16), (count, out, inner // 32)
        found[f"experts.{name}_blocks"] = torch.randint(0, 256, blocks, generator=generator, dtype=torch.uint8)
        found[f"experts.{name}_scales"] = torch.randint(116, 122, scales, generator=generator, dtype=torch.uint8)
    save_file(found, packed / "model.safetensors")
    (packed / "config.json").write_text(json.dumps({"quantization_config": {"quant_method": "mxfp4"}}))
    return sft, dpo, packed


def expo(sft: Path, dpo: Path, output: Path) -> Run:
    """One run of the program; its output is left there."""
    sides = ["--sft", str(sft), "--dpo", str(dpo), "--alpha", str(ALPHA), "--output", str(output), "--no-fsync"]
    return measure([sys.executable, "-m", "expo", "extrapolate", *sides], output / "expo.json")


def rows(runs: dict[str, list[Run]]) -> None:
    """A table's rows, beside the first way."""
    base = next(iter(runs.values()))
    for label, of_way in runs.items():
        walls = [run.wall_s for run in of_way]
        combining = [run.combine_s for run in of_way]
        ratios = [run.wall_s / other.wall_s for run, other in zip(of_way, base, strict=False)]
        parts = [one / other.combine_s for one, other in zip(combining, base, strict=False)]
        own = "–"
        if not math.isnan(combining[0]):
            times, ratio = statistics.median(combining), statistics.median(parts)
            own = f"{times:.2f} s = {ratio:.2f} ({min(parts):.2f}–{max(parts):.2f})"
        peak = max(run.peak_bytes for run in of_way) / 1e6
        print(
            f"| {label} | {statistics.median(walls):.2f} s = {statistics.median(ratios):.2f} "
            f"({min(ratios):.2f}–{max(ratios):.2f}) | {own} | {peak:.0f} MB |",
            flush=True,
        )


def agree(sft: Path, quantized: Path, output: Path) -> str:
    """Compare all weights with the rule applied to what transformers dequantizes."""
    from transformers import AutoModelForCausalLM, FineGrainedFP8Config

    said = FineGrainedFP8Config(dequantize=True)
    model = AutoModelForCausalLM.from_pretrained(quantized, quantization_config=said, dtype=torch.bfloat16)
    ours, found, other, count = open_all(sft), open_all(output), 0, 0
    for name, values in model.state_dict().items():
        wanted = torch.lerp(values, ours[name].get_tensor(name), -ALPHA)
        other += int((found[name].get_tensor(name) != wanted).sum())
        count += values.numel()
    return f"{count:,} weights compared with the rule applied to what transformers dequantizes: {other} differ"


def time_and_memory(work: Path, pair: str, rounds: int) -> None:
    """Measure, and print a table."""
    require_room(work, 6 * sum(2 * math.prod(shape) for shape in EXPERTS.values()))
    sft, dpo = make_pair(work, pair)
    both = fp8_copy(sft, work / f"sft-{pair}-fp8"), fp8_copy(dpo, work / f"dpo-{pair}-fp8")
    layers = experts_pair(work)
    out = work / "out"
    theirs = [sys.executable, "-c", THEIRS, str(sft), str(both[1]), str(ALPHA), str(out)]
    groups: list[dict[str, Callable[[], Run]]] = [
        {
            "both in bfloat16": lambda: expo(sft, dpo, out),
            "DPO in FP8": lambda: expo(sft, both[1], out),
            "both in FP8": lambda: expo(*both, out),
            IN_MEMORY: lambda: measure(theirs),
        },
        {
            "experts, both in bfloat16": lambda: expo(*layers[:2], out),
            "experts, DPO in MXFP4": lambda: expo(layers[0], layers[2], out),
        },
    ]
    print("| pair | wall, × the first (range) | combining, × the first (range) | peak |\n| --- | --- | --- | --- |")
    said = ""
    shutil.rmtree(out, ignore_errors=True)
    for ways in groups:
        runs: dict[str, list[Run]] = {label: [] for label in ways}
        for number in range(rounds):
            for label, way in ways.items():
                if number and label == IN_MEMORY:  # minutes, once
                    continue
                runs[label].append(way())
                if label == "DPO in FP8" and not said:
                    said = agree(sft, both[1], out)
                shutil.rmtree(out)
        rows(runs)
    print(f"\n{said}")


# --- what rounding does -------------------------------------------------------------------------------------------


def rounding(models: Path) -> None:
    """Print a table of a pair's noise, and of what becomes of it."""
    sides = [next(models.glob(f"*{side}")) for side in ("sft", "dpo")]
    files = [side / "model.safetensors" for side in sides]
    sft, dpo = ({name: values.double() for name, values in load_file(file).items()} for file in files)
    delta = norm({name: dpo[name] - sft[name] for name in dpo})
    print(f"‖Δ‖/‖θ_sft‖ = {delta / norm(sft):.4f}\n")
    heads = "".join(f" α = {alpha:g} |" for alpha in ALPHAS)
    print(f"| stored as | ‖noise of DPO‖/‖θ_dpo‖ | ‖Δ′ − Δ‖/‖Δ‖ |{heads}\n| --- | --- | --- |{' --- |' * len(ALPHAS)}")
    kinds: dict[str, Callable[[Tensor], Tensor]] = {
        "FP8 in blocks of 128×128": rounded_to_fp8,
        "FP8, a scale per tensor": lambda weights: rounded_to_fp8(weights, 0),
        "MXFP4": rounded_to_mxfp4,
    }
    for label, rounded in kinds.items():
        noisy = [
            {name: rounded(t).double() if name.endswith("proj.weight") else t for name, t in side.items()}
            for side in (sft, dpo)
        ]
        noise = norm({name: noisy[1][name] - dpo[name] for name in dpo}) / norm(dpo)
        for which, (s, d) in {"DPO": (sft, noisy[1]), "both": noisy}.items():
            off = norm({name: (d[name] - s[name]) - (dpo[name] - sft[name]) for name in dpo}) / delta
            errors = []
            for alpha in ALPHAS:
                right = {name: dpo[name] + alpha * (dpo[name] - sft[name]) for name in dpo}
                theta = {name: d[name] + alpha * (d[name] - s[name]) for name in dpo}
                errors.append(norm({name: theta[name] - right[name] for name in dpo}) / norm(right))
            shown = "".join(f" {error:.4f} |" for error in errors)
            print(f"| {which} in {label} | {noise:.4f} | {off:.2f} |{shown}")


def norm(tensors: dict[str, Tensor]) -> float:
    """Of all tensors together."""
    return math.sqrt(math.fsum(float(values.square().sum()) for values in tensors.values()))


# --- what it does to answers ----------------------------------------------------------------------------------------


def answers(trio: Path, work: Path, limit: int | None) -> None:
    """Sweep the pair as it is and in FP8, and print a table of rewards."""
    sft, dpo = trio / "sft", trio / "dpo"
    packed = fp8_copy(sft, work / "sft-fp8"), fp8_copy(dpo, work / "dpo-fp8")
    print(
        f"| pair |{''.join(f' α = {alpha:g} |' for alpha in SWEPT)} chosen |\n| --- |{' --- |' * (len(SWEPT) + 1)}",
        flush=True,
    )
    plain = 0.0
    for label, pair in {"in bfloat16": (sft, dpo), "DPO in FP8": (sft, packed[1]), "both in FP8": packed}.items():
        folder = work / label.replace(" ", "-")
        words = [
            "--sft",
            *pair[:1],
            "--dpo",
            *pair[1:],
            "--reward-model",
            trio / "rm",
            "--task",
            trio / "prompts.jsonl",
        ]
        words += ["--engine", "transformers", "--n", "8", "--max-tokens", "64", "--output", folder, "--overwrite"]
        words += [word for alpha in SWEPT[1:] for word in ("--alpha", alpha)]
        words += [] if limit is None else ["--limit", limit]
        command = [sys.executable, "-m", "expo", "sweep", "--any-pair", *map(str, words)]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        record = json.loads((folder / "sweep.json").read_text())
        of = {one["alpha"]: one for one in record["alphas"]}
        plain = plain or of[0.0]["mean"]
        cells = [f"{of[0.0]['mean'] - plain:+.3f} to the pair as it is"]
        cells += [
            f"{of[alpha]['difference']:+.3f} [{of[alpha]['interval'][0]:+.3f}, {of[alpha]['interval'][1]:+.3f}]"
            for alpha in SWEPT[1:]
        ]
        print(f"| {label} | {' | '.join(cells)} | {record['best_alpha']:g} |", flush=True)


def main() -> None:
    """Measure what is asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, help="folder for checkpoints and outputs")
    parser.add_argument("--pair", choices=PAIRS, default="1b")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--models", type=Path, help="folder with sft and dpo, or tiny-sft and tiny-dpo")
    parser.add_argument("--trio", type=Path, help="folder with sft, dpo, rm and prompts.jsonl, as the demo writes it")
    parser.add_argument("--limit", type=int, help="prompts of --trio")
    options = parser.parse_args()
    if options.trio:
        with tempfile.TemporaryDirectory() as folder:
            answers(options.trio, Path(folder), options.limit)
    if options.models:
        rounding(options.models)
    if options.work:
        options.work.mkdir(parents=True, exist_ok=True)
        time_and_memory(options.work, options.pair, options.rounds)


if __name__ == "__main__":
    main()
