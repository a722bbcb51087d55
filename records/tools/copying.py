r"""What models copy from their context, from finished runs.

    python records/tools/copying.py 'records/pocket_long/stack_3_wide*' \
        --data-path data/datasets/fineweb10B_sp1024

Every target of the first windows of validation is of one kind:

- copy: the token before it occurred earlier in the window, at least once with
  this target behind it
- change: the token before it occurred earlier, with others behind it
- new: the token before it did not occur

A model whose heads find what followed the last time (induction heads, arXiv
2209.11895) gains in the first kind and pays a little in the second. It is
also the only one that predicts random tokens better the second time: the last
column is that gain, of windows whose second half repeats the first. All
figures are mean losses in nats, computed in float32.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from records.tools.packages import told_if_missing

with told_if_missing(__name__):
    import torch
    import torch.nn.functional as F
    from torch import Tensor

    import train_gpt as tg
    from records.tools.common import markdown_table, read_result, require_at_least, run_tool, say
    from records.tools.compare import folders

KINDS = ("copy", "change", "new")
BATCH = 16  # windows at a time


class Windows(NamedTuple):
    """Text and what follows it, both [windows, T]."""

    ids: Tensor
    targets: Tensor


def batches(text: Windows) -> Iterator[tuple[Tensor, Tensor]]:
    """The text in parts of at most BATCH windows."""
    ids, targets = text
    return zip(ids.split(BATCH), targets.split(BATCH))


def kinds(text: Windows) -> Tensor:
    """The index in KINDS of each target [windows, T]."""
    return torch.cat([kinds_of_few(*part) for part in batches(text)])


def kinds_of_few(ids: Tensor, targets: Tensor) -> Tensor:
    """`kinds` of a batch: compares all pairs of places of a window."""
    earlier = torch.ones(ids.shape[1], ids.shape[1], dtype=torch.bool).tril(-1)
    same = (ids[:, :, None] == ids[:, None, :]) & earlier
    copied = (same & (targets[:, :, None] == targets[:, None, :])).any(-1)
    met = same.any(-1)
    return torch.where(copied, 0, torch.where(met, 1, 2))


def of_validation(path: str, a: tg.Architecture, most: int) -> Windows:
    """The first windows of the validation split, side by side."""
    T = a.train_seq_len
    tokens = tg.Tokens(tg.Config(data_path=path, vocab_size=a.vocab_size, train_seq_len=T), "val")
    count = min(most, (tokens.total - 1) // T)
    text = tokens.read(0, count * T + 1).long()
    return Windows(text[:-1].view(count, T), text[1:].view(count, T))


def of_chance(vocab_size: int, length: int, count: int) -> Windows:
    """Windows of random pieces whose second half repeats the first."""
    random = torch.Generator().manual_seed(0)
    half = torch.randint(vocab_size // 4, vocab_size, (count, length // 2), generator=random)
    text = torch.cat([half, half], 1)
    return Windows(text[:, :-1], text[:, 1:])


@torch.inference_mode()
def losses(model: tg.GPT, text: Windows) -> Tensor:
    """The loss of each target [windows, T], in nats."""
    head = getattr(model, "lm_head", model.tok_emb).float()
    found = []
    for ids, targets in batches(text):
        h = model.hidden(ids, model.scoring)[0].float()
        logits = model.softcap * torch.tanh(h @ head.T / model.softcap)
        flat = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none")
        found.append(flat.view(targets.shape))
    return torch.cat(found)


class Measured(NamedTuple):
    """A line of the table, and what text it is of."""

    cells: list[str]
    text: str


def measure(folder: Path, options: argparse.Namespace) -> Measured:
    """The line of a run: its losses by kind of target, and what repeated random tokens gain."""
    config = read_result(folder / "result.json")["config"]
    artifact = folder / tg.ARTIFACT
    if not artifact.exists():
        raise tg.InputError(f"{folder} holds no {tg.ARTIFACT}")
    model, a, _ = tg.load_model(artifact.read_bytes(), str(artifact))
    model.dtype = torch.float32  # many CPUs have no instructions for bfloat16
    text = of_validation(str(options.data_path or config["data_path"]), a, options.windows)
    by_target, kind = losses(model, text), kinds(text)
    means = [by_target.mean(), *(by_target[kind == i].mean() for i in range(len(KINDS)))]
    random = losses(model, of_chance(a.vocab_size, a.train_seq_len, 2 * BATCH))
    half = a.train_seq_len // 2
    gain = random[:, :half].mean() - random[:, half:].mean()
    cells = [f"{folder.parent.name} {folder.name}", *(f"{float(x):.3f}" for x in (*means, gain))]
    return Measured(cells, "{:,} windows of {:,} tokens".format(*text.ids.shape))


def work(options: argparse.Namespace) -> int:
    require_at_least(options, windows=1)
    runs = [folder for side in options.runs for folder in folders(side)]
    found = [measure(folder, options) for folder in runs]
    texts = dict.fromkeys(one.text for one in found)
    say(f"Validation: {' or '.join(texts)}.\n")  # a split may have fewer than were asked for
    head = ["run", "all", *KINDS, "random, second time"]
    say("\n".join(markdown_table(head, [one.cells for one in found])))
    return 0


def parser() -> argparse.ArgumentParser:
    top = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = top.add_argument
    add("runs", nargs="+", help="Folders of runs or rows, or patterns in quotes.")
    add("--data-path", type=Path, help="Folder of shards (default: as each run's result says).")
    add(
        "--windows",
        type=int,
        default=128,
        help="Number of windows of validation (default: %(default)s).",
    )
    return top


def main() -> int:
    return run_tool(work, parser().parse_args())


if __name__ == "__main__":
    sys.exit(main())
