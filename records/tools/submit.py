r"""Makes a submission folder from finished runs, and checks any such folder.

    python records/tools/submit.py logs/lab/full/T/seed* --track 10min_16mb \
        --name looped-T --author "A. Name" --github-id aname \
        --blurb "What it is." [--baseline FOLDER]
    python records/tools/submit.py --check FOLDER [--baseline FOLDER]
    python records/tools/submit.py --pack FOLDER

Every number of submission.json and of the table in README.md is parsed from
the logs, and the script is the one that the logs carry. A folder that fails
its own check is not left behind. A submission needs scores on FineWeb's
validation set; the notes say which data was scored.

--pack, before the runs, writes a short train_gpt.py that carries the text of
this repository's, compressed: the runs start it, and count its bytes.

--check also starts the folder's script, with nothing to train; --no-start
only compiles it, for folders whose code you do not trust. The exit code is 0
if nothing is wrong, 1 if the check found a fault, 2 for input that cannot be
read.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import re
import shlex
import shutil
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import fields as dataclass_fields
from pathlib import Path
from statistics import mean, stdev
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from records.tools.packages import TRAINING, told_if_missing

with told_if_missing(__name__, TRAINING):
    import train_gpt as tg
    from records.tools import checks, common, logs, packing
    from records.tools.logs import Log

SET_ASIDE = re.compile(r"\.unfinished\d+$")  # by ablate.py

# ---- 1. The runs ---------------------------------------------------------------------------------


def run_folders(paths: Sequence[Path]) -> list[Path]:
    """The folders among what a pattern such as seed* names; the rest is told and left out.

    Beside a run's folder lie its lock, its job and its console's output, which go without saying,
    and what was set aside.
    """
    folders = []
    for path in paths:
        if not path.exists():
            raise tg.InputError(f"{path} is not there")
        if path.suffix in (".lock", ".console", ".job"):
            continue
        if path.is_dir() and not SET_ASIDE.search(path.name):
            folders.append(path)
        else:
            common.warn(f"{path} is no finished run's folder and is left out")
    if not folders:
        raise tg.InputError("to make a folder, name the folders of finished runs, one a seed")
    return folders


def read_run(folder: Path) -> Log:
    """The log of a run that may be submitted; InputError says what stands in the way."""
    if not (folder / "train.log").exists():
        raise tg.InputError(f"{folder} holds no train.log: is it the folder of a run?")
    log = logs.read(folder / "train.log")
    if log.run.eval_only:
        raise tg.InputError(f"{log.run.scored_only()}: name that of the run that trained it")
    missing = log.missing() if log.ours else ["script_sha256"]
    if missing:
        told = f"{log.path} gives no {', '.join(missing)}"
        raise tg.InputError(f"{told}: is the run finished, and of this project's script?")
    digest = log.run.versions["script_sha256"]
    script = log.run.script
    if script is None or hashlib.sha256(script).hexdigest() != digest:
        raise tg.InputError(f"{log.path} does not carry the script of its run ({digest})")
    packed = log.run.versions.get("packed_sha256", "")
    if packed and hashlib.sha256(packing.pack(script)).hexdigest() != packed:
        raise tg.InputError(f"{log.path}: the script of its run was packed by another packing.py")
    for where, reason in log.disqualified:
        raise tg.InputError(f"{folder.name}/{where}: not a submission: {reason}")
    check_outcome(folder, log)
    return log


def check_outcome(folder: Path, log: Log) -> None:
    """InputError if result.json or the exit code says that the run is none to submit."""
    result = common.read_result(folder / "result.json")
    if result.get("fits") is not True:
        raise tg.InputError(f"{folder / 'result.json'}: script and artifact do not fit the limit")
    digest = result.get("artifact_sha256", log.words["artifact"])
    if digest != log.words["artifact"]:
        raise tg.InputError(f"{folder / 'result.json'} is of another artifact than {log.path}")
    record = folder / "run.json"
    code = common.read_result(record).get("exit_code", 0) if record.exists() else 0
    if code != 0:
        raise tg.InputError(f"{record}: the run ended with exit code {code}")


def read_runs(paths: Sequence[Path]) -> list[Log]:
    """The logs of runs of one system, by seed."""
    found = [read_run(folder) for folder in run_folders(paths)]
    found.sort(key=lambda log: log.values["seed"])
    first = found[0]
    for log in found[1:]:
        differ = common.differences(log.settings(), first.settings())
        if log.run.script != first.run.script:
            hashes = [one.run.versions["script_sha256"][:12] for one in (log, first)]
            differ = [f"the script's sha256 is {' and '.join(hashes)}", *differ]
        if differ:
            raise tg.InputError(
                f"{log.path.parent} and {first.path.parent} are of different scripts or "
                f"configurations: {common.listed(differ)}"
            )
    seeds = [int(log.values["seed"]) for log in found]
    if len(set(seeds)) < len(seeds):
        raise tg.InputError("two of the runs have the same seed")
    return found


# ---- 2. Making a folder --------------------------------------------------------------------------


def seed_figures(log: Log) -> dict[str, Any]:
    """submission.json's entry of a seed."""
    values = log.values
    return dict(
        val_loss=values["val_loss"],
        val_bpb=values["val_bpb"],
        pre_quant_val_bpb=values["pre_bpb"],
        steps=int(values["steps"]),
        step_avg_ms=values["step_ms"],
        train_time_s=log.train_and_calibrate_ms / 1e3,
        eval_time_s=values["eval_ms"] / 1e3,
        artifact_bytes=int(values["model"]),
        bytes_total=int(values["total"]),
        artifact_sha256=log.words["artifact"],
    )


def compliance(runs: Sequence[Log]) -> dict[str, bool]:
    """Limits of the record track, by all that counts, and by what the runs say of themselves."""
    limit, honest = 1e3 * checks.TIME_LIMIT, not any(log.disqualified for log in runs)
    trained = max(log.train_and_calibrate_ms for log in runs)
    evaluated = max(log.values["eval_ms"] for log in runs)
    largest = max(log.values["total"] for log in runs)
    return dict(
        train_under_600s=honest and trained <= limit,
        eval_under_600s=honest and evaluated <= limit,
        artifact_under_16mb=honest and largest <= checks.SIZE_LIMIT,
    )


def submission(
    runs: Sequence[Log], given: argparse.Namespace, baseline: Sequence[Log]
) -> dict[str, Any]:
    """submission.json: what people say about it, then what the logs say."""
    losses, scores = ([log.values[name] for log in runs] for name in ("val_loss", "val_bpb"))
    models = [log.values["model"] for log in runs]
    deviations = {}
    if len(runs) > 1:
        deviations = dict(val_loss_std=round(stdev(losses), 8), val_bpb_std=round(stdev(scores), 8))
    first = runs[0]
    made = dict(
        author=given.author,
        github_id=given.github_id,
        name=given.name,
        blurb=given.blurb,
        date=given.date,
        track=given.track,
        val_loss=round(mean(losses), 8),
        val_bpb=round(mean(scores), 8),
        **deviations,
        pre_quant_val_bpb=round(mean(log.values["pre_bpb"] for log in runs), 8),
        seeds=[int(log.values["seed"]) for log in runs],
        seed_results={str(int(log.values["seed"])): seed_figures(log) for log in runs},
        bytes_total=int(max(log.values["total"] for log in runs)),
        bytes_code=int(first.values["code"]),
        artifact_bytes_mean=round(mean(models), 1),
        artifact_bytes_max=int(max(models)),
        hardware=f"{int(first.values['ranks'])}x {first.words['device']}",
        pytorch_version=first.words["torch"],
        compliance=compliance(runs),
    )
    if baseline:
        theirs = [log.values["val_loss"] for log in baseline]
        made["comparison"] = checks.comparison(runs, theirs, given.baseline.name)
    return made


def idle_options(config: tg.Config) -> set[str]:
    """Options that cannot act in a configuration, in capitals; naming them would be an error."""
    idle = set()
    for field in dataclass_fields(tg.Config):
        needs = field.metadata["needs"].split()
        if any(config.unmet_need(need) for need in needs):
            idle.add(field.name.upper())
    return idle


def data_variables(log: Log) -> dict[str, str]:
    """DATA_PATH and TOKENIZER_PATH of a run where they are not the defaults.

    What lies in this repository is named relative to it.
    """
    found = {}
    for name in ("DATA_PATH", "TOKENIZER_PATH"):
        path, usual = Path(log.run.settings()[name]), Path(getattr(tg.Config, name.lower()))
        if path.is_relative_to(common.ROOT):
            path = path.relative_to(common.ROOT)
        if path != usual:
            found[name] = str(path)
    return found


def command(log: Log, script: str) -> str:
    """How the run is repeated: what its configuration changes of the defaults and can act in it."""
    settings, kinds = log.settings(), tg.option_types()
    known = {name: text for name, text in settings.items() if name.lower() in kinds}
    values = {
        name.lower(): tg.parse(name, text, kinds[name.lower()]) for name, text in known.items()
    }
    idle = idle_options(tg.Config(**values)) | {"PRESET"}
    defaults = {f.name.upper(): tg.show(f.default) for f in dataclass_fields(tg.Config)}
    words = [
        f"{name}={shlex.quote(value)}"
        for name, value in (settings | data_variables(log)).items()
        if name not in idle and value != defaults.get(name)
    ]
    ranks = int(log.values["ranks"])
    python = "python"
    if ranks > 1:
        python = f"torchrun --standalone --nproc_per_node={ranks}"
    return " ".join([*words, f"SEED={log.values['seed']:.0f}", python, shlex.quote(script)])


def readme(runs: Sequence[Log], made: dict[str, Any], folder: str) -> str:
    """README.md of a submission whose folder has this name below that of its track."""
    # The repository has another train_gpt.py in its root, where data/ is.
    script = f"records/track_{made['track']}/{folder}/train_gpt.py"
    hardware = f"Hardware: {made['hardware']}; PyTorch {made['pytorch_version']}."
    return "\n".join(
        [
            f"# {made['name']}",
            "",
            made["blurb"],
            "",
            checks.FIGURES,
            *checks.figures(runs, made.get("comparison")),
            checks.END,
            "",
            f"{hardware} Scores are those of the artifact, reloaded from disk.",
            "",
            "From the root of the repository:",
            "",
            "    " + command(runs[0], script),
            "",
        ]
    )


def make(given: argparse.Namespace) -> Path:
    """The folder of some runs; InputError names what stands in the way."""
    runs = read_runs(given.runs)
    slug = re.sub(r"[^A-Za-z0-9]+", "_", given.name).strip("_")
    folder = given.to / f"track_{given.track}" / f"{given.date}_{slug}"
    if folder.exists():
        raise tg.InputError(f"{folder} exists: choose another --name or --date")
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent.parent) as scratch:
        draft = Path(scratch) / folder.parent.name / folder.name
        fill(draft, runs, given)
        found = checks.check(draft, given.baseline, not given.no_start)
        if wrong := checks.faults(found):
            told = "\n".join(map(str, wrong))
            raise tg.InputError(f"the runs make no valid submission:\n{told}")
        os.rename(draft, folder)
    for finding in found:
        common.say(str(finding))
    return folder


def fill(draft: Path, runs: Sequence[Log], given: argparse.Namespace) -> None:
    """Writes script, logs, artifacts if asked for, requirements, submission.json and README.md."""
    draft.mkdir(parents=True)
    source = runs[0].run.script
    assert source is not None  # read_run has looked
    if "packed_sha256" in runs[0].run.versions:
        write_packed(draft, source)
    else:
        (draft / "train_gpt.py").write_bytes(source)
    for log in runs:
        seed = f"seed{log.values['seed']:.0f}"
        shutil.copyfile(log.path, draft / f"train_{seed}.log")
        if given.artifacts:
            shutil.copyfile(log.path.with_name(tg.ARTIFACT), draft / f"model_{seed}.ptz")
    used = runs[0].packages.items()
    pins = [f"{name}=={version}\n" if version else f"{name}\n" for name, version in used]
    (draft / "requirements.txt").write_text("".join(pins))
    baseline = checks.read_baseline(given.baseline) if given.baseline else []
    made = submission(runs, given, baseline)
    (draft / "submission.json").write_text(json.dumps(made, indent=2) + "\n")
    (draft / "README.md").write_text(readme(runs, made, draft.name))


# ---- 3. Packing a script ------------------------------------------------------------------------


def write_packed(folder: Path, source: bytes) -> None:
    """Writes the packed form of a script, and its text beside it."""
    tg.write_atomically(folder / "train_gpt.py", packing.pack(source))
    tg.write_atomically(folder / packing.READABLE, source)


def pack(folder: Path) -> str:
    """Packs this repository's script into a folder; what that gave. InputError spares other files.

    A packed script that is there already is replaced.
    """
    script, replaced = folder / "train_gpt.py", ""
    if script.exists():
        if packing.unpack(script.read_bytes()) is None:
            raise tg.InputError(f"{script} is no packed script and would be overwritten")
        replaced = "; it replaces the packed script that was there"
    source = (common.ROOT / "train_gpt.py").read_bytes()
    folder.mkdir(parents=True, exist_ok=True)
    write_packed(folder, source)
    size = f"{script.stat().st_size} bytes, packed of {len(source)}"
    return f"{script}: {size}; {packing.READABLE} is its text{replaced}"


# ---- 4. The command ------------------------------------------------------------------------------


def parser() -> argparse.ArgumentParser:
    top = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    today = time.strftime("%Y-%m-%d")
    add = top.add_argument
    add("runs", nargs="*", type=Path, help="Folders of finished runs, one a seed.")
    add("--check", type=Path, metavar="FOLDER", help="Check this folder instead of making one.")
    add(
        "--pack",
        type=Path,
        metavar="FOLDER",
        help="Before the runs: write the packed train_gpt.py that they start, and its text.",
    )
    add(
        "--baseline",
        type=Path,
        metavar="FOLDER",
        help="The submission that is to be beaten; the losses of its logs are compared.",
    )
    add(
        "--no-start",
        action="store_true",
        help="Only compile the folder's script, do not start it: its code is not trusted.",
    )
    add(
        "--track",
        choices=checks.TRACKS,
        help="The track that the folder is made for; there is no default.",
    )
    add("--name", help="The name of the submission; the folder is named after it.")
    add("--author", help="Who submits.")
    add("--github-id", help="The name of the author's account.")
    add("--blurb", help="One or two sentences about what it is.")
    add("--date", default=today, help="The date in the folder's name (default: today).")
    add("--artifacts", action="store_true", help="Put the artifacts into the folder, too.")
    add(
        "--to",
        type=Path,
        default=common.ROOT / "records",
        help="Where the folders of the tracks are (default: records/ of this repository).",
    )
    return top


def runs_instead(folder: Path) -> str:
    """The words that name a folder's runs if it holds those in place of a submission, else ""."""
    parts = ("README.md", "submission.json", "train_gpt*.py")
    if any(path for part in parts for path in folder.glob(part)):
        return ""
    for pattern, runs in (("train.log", folder), ("*/train.log", folder / "*")):
        if any(folder.glob(pattern)):
            return str(runs)
    return ""


def check_folder(given: argparse.Namespace) -> int:
    """Prints what the check found; 1 if a fault is among it.

    InputError if the folder is a run's, or of runs, of which a submission can be made.
    """
    if runs := runs_instead(given.check):
        raise tg.InputError(
            f"{given.check} is no submission but what runs wrote; to make one: submit.py {runs} "
            "--track ... --name ... --author ... --github-id ... --blurb ..."
        )
    found = checks.check(given.check, given.baseline, not given.no_start)
    for finding in found:
        common.say(str(finding))
    if checks.faults(found):
        return 1
    folder = checks.Folder(given.check)
    for log in folder.complete:
        common.say(summary(log))
    common.say(f"ok {given.check}: nothing contradicts its logs")
    return 0


def summary(log: Log) -> str:
    """What was found in a log, in a line."""
    seed = log.values.get("seed")
    name = "no seed" if seed is None else f"seed {seed:.0f}"
    score = f"val_bpb {log.values['val_bpb']} ({log.words['final']})"
    spent = log.values.get("eval_ms")
    evaluation = "" if spent is None else f", evaluation {spent / 1e3:.1f} s"
    training = checks.training_time(log) if log.train_and_calibrate_ms else "no training time"
    return f"found {log.path.name}: {name}, {score}, {training}{evaluation}, scored on {log.data}"


def run(given: argparse.Namespace) -> int:
    if given.check:
        return check_folder(given)
    if given.pack:
        common.say(pack(given.pack))
        return 0
    needed = ("track", "name", "author", "github_id", "blurb")
    missing = ["--" + name.replace("_", "-") for name in needed if not getattr(given, name)]
    if missing:
        raise tg.InputError(f"to make a folder, give {', '.join(missing)}, too")
    common.say(str(make(given)))
    return 0


def main() -> int:
    return common.run_tool(run, parser().parse_args())


if __name__ == "__main__":
    sys.exit(main())
