"""The paper's eight tables: their rows, the config of each, the paper's numbers. Read from ``experiments/``."""

from __future__ import annotations

import hashlib
import json
from operator import attrgetter
from pathlib import Path
from typing import Any, NamedTuple

from senticlip import config as configs
from senticlip.config import Config
from senticlip.configfile import parse_overrides, read
from senticlip.structures import OWN_LABEL, UsageError

EXPERIMENTS = Path(__file__).parent / "experiments"
PAPER_METRICS = ("accuracy", "macro_f1", "precision", "recall")


class Row(NamedTuple):
    """A row of a table in the paper: its configs by target label, and the paper's numbers in per cent."""

    name: str
    configs: dict[str, Config]
    paper: dict[str, float]


class Table(NamedTuple):
    """One table; its rows are compared with the row ``reference``."""

    number: str
    title: str
    claim: str
    reference: str
    rows: list[Row]


class RunSettings(NamedTuple):
    """What was run: a preset, the ``KEY=VALUE`` changes that turned it into ``config``, and the data set."""

    config: Config
    preset: str
    changes: list[str]
    data: str

    def to_dict(self) -> dict[str, Any]:
        """As ``results.json`` has it."""
        return {"preset": self.preset, "changed": self.changes, "protocol": self.config.protocol, "data": self.data}

    def summary(self, seeds: int) -> str:
        """The beginning of the report."""
        changed = f" (changed: {', '.join(self.changes)})" if self.changes else ""
        summary = f"preset {self.preset}{changed}, protocol {self.config.protocol}, {seeds} seed(s)"
        return f"Data “{Path(self.data).name}”, {summary}"

    def kept_value_notes(self, table: Table) -> list[str]:
        """Sentences that name the rows which keep their own value of a changed key.

        Modalities and targets are left out, as the table itself shows them.
        """
        sentences = []
        for key in configs.dotted(parse_overrides(self.changes)):
            if key.split(".")[0] in ("stages", "options", "modalities", "target"):
                continue
            get_value = attrgetter(key)
            value = get_value(self.config)
            if names := [row.name for row in table.rows if any(get_value(c) != value for c in row.configs.values())]:
                sentences.append(f"The change to {key} does not apply to {', '.join(names)}: their own value stays.")
        return sentences


def load_preset(name: str, overrides: list[str] | None = None) -> Config:
    """The config of the preset ``tiny``, ``small`` or ``paper``, or of a YAML file."""
    path = Path(name) if name.endswith((".yaml", ".yml")) else EXPERIMENTS / f"{name}.yaml"
    if not path.is_file() and path.parent == EXPERIMENTS:
        names = sorted(file.stem for file in EXPERIMENTS.glob("*.yaml") if file.stem != "tables")
        raise UsageError(f"--preset {name}: choose one of {', '.join(names)}")
    return configs.load(path, overrides)


def load_experiment(files: list[str], overrides: list[str] | None = None) -> Config:
    """A YAML file, more files applied on top like the rows of a table (the first's stages stay), ``a.b=c`` overrides.

    With several files, overrides are applied to the first, stages included, as in ``reproduce``, and again at the end.

    Raises:
        UsageError: as ``config.load``.
    """
    if not files[1:]:
        return configs.load(files[0], overrides)
    changes = parse_overrides(overrides or [])
    # options belong to the model of the last file
    config = configs.from_file(files[0]).override({k: v for k, v in changes.items() if not k.startswith("options")})
    for file in files[1:]:
        try:
            config = changed(config, configs.dotted(read(file)))
        except UsageError as error:
            raise UsageError(f"{file}: {error}") from None
    return configs.finish(changed(config, {k: v for k, v in changes.items() if not k.startswith("stages")}))


def load_tables(preset: Config, numbers: list[str] | None, labels: set[str], random: bool) -> list[Table]:
    """The tables of ``experiments/tables.yaml``, applied to a preset.

    Args:
        preset: the full model, which each row changes.
        numbers: the tables; None: all.
        labels: the labels that the data set has (M, T, A, V).
        random: give random weights to the encoders that the preset does not use.

    Raises:
        UsageError: no table has that number, or no number is given.
    """
    data = read(EXPERIMENTS / "tables.yaml")
    chosen = list(dict.fromkeys(data["tables"] if numbers is None else numbers))
    unknown = [number for number in chosen if number not in data["tables"]]
    if unknown or not chosen:
        wrong = ",".join(unknown) or "without a number"
        raise UsageError(f"--tables {wrong}: the paper has Tables {', '.join(data['tables'])}")
    tables = []
    for number in chosen:
        table = data["tables"][number]
        rows = []
        for name, row in table["rows"].items():
            changes = row_changes(row.get("config"))
            by_target = row_configs(preset, table.get("base"), changes, labels, data["random"] if random else {})
            rows.append(Row(name, by_target, dict(zip(PAPER_METRICS, row["paper"], strict=False))))
        tables.append(Table(number, table["title"], table["claim"], table["reference"], rows))
    return tables


def notes() -> list[str]:
    """Notes on inconsistencies in the paper's numbers."""
    return read(EXPERIMENTS / "tables.yaml")["notes"]


def row_changes(file: str | None) -> dict[str, Any]:
    """The dotted keys that a row's YAML changes."""
    return configs.dotted(read(EXPERIMENTS / file)) if file else {}


def row_configs(
    preset: Config, base: str | None, changes: dict[str, Any], labels: set[str], random: dict[str, dict[str, Any]]
) -> dict[str, Config]:
    """A row's configs by target: the preset's; for a single encoder (``base``), the modality's own label, then M."""
    if base is None:
        return {preset.target: _apply_changes(preset, changes, random)}
    single = preset.stage(base) if base in preset.stages else preset.override({"modalities": [base], "stages": {}})
    config = _apply_changes(single, changes, random)
    targets = [target for target in (OWN_LABEL[base], "M") if target in labels]
    return {target: config.override({"target": target}) for target in targets}


def _apply_changes(config: Config, changes: dict[str, Any], random: dict[str, dict[str, Any]]) -> Config:
    """Apply a row's changes; with ``random``, a replaced encoder gets random weights and no stage trains it."""
    if not changes:
        return config
    result = changed(config, changes)
    for name, overrides in random.items():
        encoder = getattr(result, name).encoder
        if encoder == getattr(config, name).encoder or encoder == "openface" or Path(encoder).is_dir():
            continue
        stages = {k: stage for k, stage in result.stages.items() if name not in stage["modalities"]}
        result = result.override({**overrides, "stages": stages})
    return result


def changed(config: Config, changes: dict[str, Any]) -> Config:
    """The config with dotted keys changed, except in its stages."""
    return config.override({**changes, "stages": _pinned_stages(config, changes)})


def _pinned_stages(config: Config, changes: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """The stages of ``config`` written out in full, so that a row's changes do not affect them.

    All rows then share the trained encoders; only if a row replaces an encoder are the stages that use it run again.
    """
    pinned = {}
    for name in config.stages:
        stage = config.stage(name)
        reads = {*stage.modalities} | ({"label"} if "vision" in stage.modalities else set())
        encoders = {k: v for k, v in changes.items() if k.endswith(".encoder") and k.split(".")[0] in reads}
        values = stage.override(encoders).to_dict()
        pinned[name] = {key: value for key, value in values.items() if key not in ("stages", "seed")}
    return pinned


def digest(config: Config) -> str:
    """A hash of the config without its seed: equal for two rows that are the same experiment."""
    data = {**config.to_dict(), "seed": 0}
    return hashlib.blake2b(json.dumps(data, sort_keys=True).encode(), digest_size=5).hexdigest()
