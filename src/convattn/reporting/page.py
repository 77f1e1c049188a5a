"""The page of the report: results in, HTML out."""

from collections.abc import Mapping
from typing import Any

from convattn.checks import extra
from convattn.errors import ComparisonError
from convattn.reporting import figures, text
from convattn.reporting.bars import MOST_CLASSES

SCHEMA = 2
# what a table or list shows at most; all of it is in results.json
MOST_TABLE_CLASSES, MOST_LEFT_OUT = 200, 500

SETTINGS = {
    "backbone": "Network",
    "weights": "Weights at the start",
    "start": "Start of the attention",
    "epochs": "Epochs",
    "image_size": "Image size, pixels",
    "batch_size": "Batch size",
    "learning_rate": "Learning rate",
    "learning_rates": "Learning rates chosen",
    "gate_learning_rate": "Learning rate of what is attached",
    "weight_decay": "Weight decay",
    "flip": "Horizontal flips",
    "seeds": "Seeds",
    "smallest_gain_points": "Smallest gain that matters, points",
    "confidence": "Confidence of the intervals",
    "threads": "Threads",
    "device": "Device",
}

# what the page is drawn from, beside the schema
KEYS = (
    "convattn",
    "headline",
    "leak",
    "data",
    "setting",
    "looks",
    "command",
    "versions",
    "could_see_points",
    "baseline",
    "variants",
    "controls",
    "tuning",
    "audit",
    "changes",
)


def render(results: Mapping[str, Any]) -> str:
    """The whole report as one HTML document."""
    _check_schema(results.get("schema"))
    missing = [key for key in KEYS if key not in results]
    if missing:
        raise ComparisonError(
            f"report: the results have no {', '.join(missing)}: give the command that made them once more."
        )
    jinja2 = extra("jinja2", "the report")
    page = jinja2.Environment(
        loader=jinja2.PackageLoader("convattn", "reporting"),
        # class names and paths come from users
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    page.filters |= {
        "number": text.number,
        "signed": text.signed,
        "short": text.short,
        "interval": text.interval,
        "p_value": text.p_value,
        "magnitude": text.magnitude,
        "size": text.size,
        "three_digits": text.three_digits,
        "plain": text.plain,
    }
    rendered: str = page.get_template("report.html.j2").render(
        results,
        figures=figures.draw_all(results),
        settings=_settings(results["setting"], tuned=results.get("tuning") is not None),
        most_classes=MOST_CLASSES,
        most_table_classes=MOST_TABLE_CLASSES,
        most_left_out=MOST_LEFT_OUT,
    )
    return rendered


def _check_schema(schema: object) -> None:
    if schema == SCHEMA:
        return
    older = isinstance(schema, int) and schema < SCHEMA
    what = (
        "give the command that made them once more, which writes them anew and trains nothing again."
        if older
        else "draw the report with the version of convattn that made them."
    )
    raise ComparisonError(f"report: expected results of schema {SCHEMA}, got schema {schema!r}; {what}")


def _settings(setting: Mapping[str, Any], *, tuned: bool) -> list[tuple[str, str]]:
    """What was set, in words; a setting that this list does not know yet still appears, under its own name."""
    return [
        (SETTINGS.get(key, key.replace("_", " ").capitalize()), _told(value))
        for key, value in setting.items()
        # where nothing was chosen, all of them are the learning rate
        if value is not None and (tuned or key != "learning_rates")
    ]


def _told(value: object) -> str:
    if value is None:
        return text.ABSENT
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return text.short(value)
    if isinstance(value, Mapping):
        return ", ".join(f"{name} {_told(one)}" for name, one in value.items())
    if isinstance(value, (list, tuple)):
        return ", ".join(map(_told, value))
    return str(value)
