"""Does sharing help? Single-task, shared-bottom, MMoE and PLE on Census-Income and Adult, two tasks, several seeds.

Tasks: income over 50,000 and never married. The split is fixed (60 / 20 / 20 %, by a seed of its own), the seed changes
initial weights and order of batches; the epoch with the best mean validation AUROC is tested. Census-Income is the
99,762-row test part of the original, split anew: its numbers do not compare with those on the full file.

    python benchmarks/bench_mtl_heads_census.py --data ../shared/data --out benchmarks/results/mtl_heads_census
"""

import argparse
import copy
import csv
import gzip
import os
import statistics
import sys
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from record import header, provenance, write
from torch import Tensor, nn

from mtl_heads import PLE, WEIGHTINGS, MMoE, MultiTaskHeads, SharedBottom, TaskSpec
from mtl_heads.metrics import AUROC

TASKS = ("income", "never_married")
CENSUS_COLUMNS = """
age class_worker det_ind_code det_occ_code education wage_per_hour hs_college marital_stat major_ind_code
major_occ_code race hisp_origin sex union_member unemp_reason full_or_part_emp capital_gains capital_losses
stock_dividends tax_filer_stat region_prev_res state_prev_res det_hh_fam_stat det_hh_summ instance_weight
mig_chg_msa mig_chg_reg mig_move_reg mig_same mig_prev_sunbelt num_emp fam_under_18 country_father country_mother
country_self citizenship own_or_self vet_question vet_benefits weeks_worked year income_50k
""".split()  # noqa: SIM905

NUMBERS = {
    "census": {
        "age", "wage_per_hour", "capital_gains", "capital_losses", "stock_dividends", "num_emp", "weeks_worked",
    },
    "adult": {"age", "education-num", "capital-gain", "capital-loss", "hours-per-week"},
}  # fmt: skip
# Labels, sampling weights, and in Adult the column that spells the marriage out.
DROPPED = {
    "census": {"income_50k", "marital_stat", "instance_weight"},
    "adult": {"classification", "marital-status", "fnlwgt", "relationship"},
}
Split = tuple[Tensor, Tensor, dict[str, Tensor]]


def read(name: str, folder: Path) -> tuple[list[str], list[list[str]]]:
    """Column names and rows of a data set."""
    if name == "census":
        with gzip.open(folder / "census-income-test" / "census-income.test.gz", "rt") as file:
            return CENSUS_COLUMNS, [[cell.strip() for cell in row] for row in csv.reader(file) if row]
    rows, header = [], []
    for part in ("adult.data", "adult.test"):
        with open(folder / "adult" / part) as file:
            table = [[cell.strip() for cell in row] for row in csv.reader(file) if row]
        header, rows = table[0], rows + table[1:]
    return header, rows


def load(name: str, folder: Path, split_seed: int) -> tuple[list[int], int, dict[str, Split]]:
    """Vocabulary sizes, number of numeric columns, and the three splits; everything is fitted on the training rows."""
    header, rows = read(name, folder)
    income = "income_50k" if name == "census" else "classification"
    marital = "marital_stat" if name == "census" else "marital-status"
    never = "Never married" if name == "census" else "Never-married"
    at = {column: i for i, column in enumerate(header)}
    labels = {
        "income": torch.tensor([float("50000+" in row[at[income]] or ">50K" in row[at[income]]) for row in rows]),
        "never_married": torch.tensor([float(row[at[marital]] == never) for row in rows]),
    }
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(split_seed))
    first, second = int(0.6 * len(rows)), int(0.8 * len(rows))
    parts = {"train": order[:first], "valid": order[first:second], "test": order[second:]}
    codes, numbers, sizes = [], [], []
    for column in header:
        if column in DROPPED[name]:
            continue
        cells = [row[at[column]] for row in rows]
        if column in NUMBERS[name]:
            values = torch.log1p(torch.tensor([float(cell) for cell in cells]))
            seen = values[parts["train"]]
            numbers.append((values - seen.mean()) / seen.std().clamp_min(1e-6))
            continue
        counts = Counter(cells[i] for i in parts["train"].tolist())
        vocabulary = {value: i for i, value in enumerate(sorted(counts), start=1)}
        codes.append(torch.tensor([vocabulary.get(cell, 0) for cell in cells]))
        sizes.append(len(vocabulary) + 1)
    x, z = torch.stack(codes, 1), torch.stack(numbers, 1)
    splits = {part: (x[i], z[i], {task: y[i] for task, y in labels.items()}) for part, i in parts.items()}
    return sizes, z.shape[1], splits


class Model(nn.Module):
    """Embeddings and numbers, a trunk, a tower and a logit for each task."""

    def __init__(self, kind: str, sizes: Sequence[int], num_numbers: int, tasks: Sequence[str]) -> None:
        super().__init__()
        self.tables = nn.ModuleList(nn.Embedding(size, min(8, 1 + size // 2)) for size in sizes)
        d_in = sum(min(8, 1 + size // 2) for size in sizes) + num_numbers
        if kind in ("single", "shared-bottom"):
            self.trunk: nn.Module = SharedBottom(d_in, tasks, [128, 64])
        elif kind == "mmoe":
            self.trunk = MMoE(d_in, tasks, num_experts=4, hidden=[64, 64])
        else:
            self.trunk = PLE(d_in, tasks, num_task_experts=1, num_shared_experts=2, hidden=[64], num_levels=2)
        self.heads = MultiTaskHeads(64, [TaskSpec(task, "binary", hidden=(32,)) for task in tasks])

    def features(self, codes: Tensor, numbers: Tensor) -> dict[str, Tensor]:
        embedded = [table(column) for table, column in zip(self.tables, codes.unbind(1), strict=True)]
        features: dict[str, Tensor] = self.trunk(torch.cat([*embedded, numbers], 1))
        return features


@torch.no_grad()
def score(model: Model, split: Split, tasks: Sequence[str]) -> dict[str, float]:
    """AUROC of each task."""
    model.eval()
    codes, numbers, labels = split
    metrics = {task: AUROC() for task in tasks}
    for part in torch.arange(len(codes)).split(8192):
        out = model.heads(model.features(codes[part], numbers[part]))
        for task in tasks:
            metrics[task].update(out[task], labels[task][part])
    model.train()
    return {task: metric.compute()["macro"] for task, metric in metrics.items()}


def train(
    kind: str, tasks: Sequence[str], data: tuple[list[int], int, dict[str, Split]], seed: int, a: argparse.Namespace
) -> dict[str, Any]:
    """Test AUROC at the best validation epoch."""
    sizes, num_numbers, splits = data
    torch.manual_seed(seed)
    model = Model(kind, sizes, num_numbers, tasks)
    weighting = WEIGHTINGS[a.weighting](tasks)
    optimiser = torch.optim.Adam([*model.parameters(), *weighting.parameters()], a.lr)
    shared = [p for p in model.trunk.shared_parameters()][-2:]  # type: ignore[operator]
    codes, numbers, labels = splits["train"]
    best, kept, best_epoch = -1.0, model.state_dict(), 0
    for epoch in range(a.epochs):
        for part in torch.randperm(len(codes)).split(a.batch_size):
            targets = {task: labels[task][part] for task in tasks}
            losses = model.heads.losses(model.features(codes[part], numbers[part]), targets)
            optimiser.zero_grad()
            weighting(losses, shared=shared).backward()
            optimiser.step()
            if hasattr(weighting, "update"):
                with torch.no_grad():
                    weighting.update(model.heads.losses(model.features(codes[part], numbers[part]), targets))
        weighting.end_epoch()
        reached = statistics.fmean(score(model, splits["valid"], tasks).values())
        if reached > best:
            best, kept, best_epoch = reached, copy.deepcopy(model.state_dict()), epoch + 1
    model.load_state_dict(kept)
    result = score(model, splits["test"], tasks)
    return {
        "auroc": result,
        "parameters": sum(p.numel() for p in model.parameters()),
        "best epoch": best_epoch,
    }


def run(kind: str, data: tuple[list[int], int, dict[str, Split]], seed: int, a: argparse.Namespace) -> dict[str, Any]:
    if kind != "single":
        return train(kind, TASKS, data, seed, a)
    apart = [train(kind, (task,), data, seed, a) for task in TASKS]
    return {
        "auroc": {task: one["auroc"][task] for task, one in zip(TASKS, apart, strict=True)},
        "parameters": sum(one["parameters"] for one in apart),
        "best epoch": [one["best epoch"] for one in apart],
    }


def table(report: dict[str, Any]) -> str:
    meta = report["run"]
    lines = [
        "# Single-task against shared-bottom, MMoE and PLE",
        "",
        header(report["provenance"]),
        f"{meta['threads']} threads; seeds {', '.join(map(str, meta['seeds']))}; {meta['epochs']} epochs of batches "
        f"of {meta['batch_size']}, Adam {meta['lr']}, weighting {meta['weighting']}. Test AUROC, mean over the seeds ± "
        "standard deviation, in brackets least and largest.",
        "",
    ]
    for name, rows in report["results"].items():
        size = report["sizes"][name]
        lines += [
            f"## {name}: {size['rows']} rows, positives "
            + ", ".join(f"{task} {share:.1%}" for task, share in size["positives"].items()),
            "",
            "| model | parameters | " + " | ".join(TASKS) + " | mean |",
            "|---|---|" + "---|" * (len(TASKS) + 1),
        ]
        spread = {}
        for kind, runs in rows.items():
            cells = [kind, f"{runs[0]['parameters']:,}"]
            by_task = [[one["auroc"][task] for one in runs] for task in TASKS]
            means = [statistics.fmean(one["auroc"].values()) for one in runs]
            for values in (*by_task, means):
                deviation = statistics.stdev(values) if len(values) > 1 else 0.0
                cells.append(f"{statistics.fmean(values):.4f} ± {deviation:.4f} ({min(values):.4f}-{max(values):.4f})")
            spread[kind] = (statistics.fmean(means), statistics.stdev(means) if len(means) > 1 else 0.0)
            lines.append("| " + " | ".join(cells) + " |")
        lines += ["", verdict(spread), ""]
    return "\n".join(lines)


def verdict(spread: dict[str, tuple[float, float]]) -> str:
    """One honest sentence: which shared model is outside the noise of single-task, if any."""
    single, noise = spread["single"]
    said = []
    for kind, (mean, deviation) in spread.items():
        if kind != "single":
            gap, bar = mean - single, (noise**2 + deviation**2) ** 0.5
            word = "within the noise of" if abs(gap) <= 2 * bar else "above" if gap > 0 else "below"
            said.append(f"{kind} is {word} single-task ({gap:+.4f}, two standard deviations {2 * bar:.4f})")
    return "Mean of the two tasks: " + "; ".join(said) + "."


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    default = os.environ.get("FOOTFALL_DATA", "../shared/data")
    parser.add_argument("--data", type=Path, default=Path(default), help="folder with census-income-test/ and adult/")
    parser.add_argument("--sets", nargs="+", default=["census", "adult"], choices=["census", "adult"])
    parser.add_argument("--models", nargs="+", default=["single", "shared-bottom", "mmoe", "ple"])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--split-seed", type=int, default=0, help="of the fixed split")
    parser.add_argument("--epochs", type=int, default=8)
    parser.add_argument("--batch-size", type=int, default=1024)
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--weighting", default="static", choices=sorted(WEIGHTINGS))
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, help="write OUT.json and OUT.md (no data rows)")
    a = parser.parse_args()
    torch.set_num_threads(a.threads)
    report: dict[str, Any] = {
        "run": {
            "threads": a.threads,
            "seeds": a.seeds,
            "epochs": a.epochs,
            "batch_size": a.batch_size,
            "lr": a.lr,
            "weighting": a.weighting,
        },
        "provenance": provenance(a.split_seed, "torch"),
        "sizes": {},
        "results": {},
    }
    for name in a.sets:
        data = load(name, a.data, a.split_seed)
        labels = {task: torch.cat([split[2][task] for split in data[2].values()]) for task in TASKS}
        positives = {task: float(y.mean()) for task, y in labels.items()}
        report["sizes"][name] = {"rows": len(labels["income"]), "positives": positives}
        report["results"][name] = {}
        for kind in a.models:
            start = time.perf_counter()
            report["results"][name][kind] = [run(kind, data, seed, a) for seed in a.seeds]
            print(f"{name} {kind}: {time.perf_counter() - start:.0f} s", file=sys.stderr, flush=True)
    print(table(report))
    if a.out:
        write(a.out, report, table(report))


if __name__ == "__main__":
    main()
