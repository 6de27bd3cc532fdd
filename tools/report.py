"""Evaluates weights and writes one page: key figures, training curves, classes, confusion matrix and the worst images.

    python tools/report.py --weights runs/checkpoints/best_model.pth           # writes best_model.html beside it
    python tools/report.py --weights W --dataset camvid --data datasets/camvid --out page.html

The page is a single HTML file without JavaScript. Its curves are those of the run whose `checkpoints` folder holds the
weights. The last line on stdout is one JSON object.
"""

from __future__ import annotations

import argparse
import base64
import io
import json
import math
import sys
from collections.abc import Sequence
from datetime import timedelta
from html import escape
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from launch import OneLineParser, exit_status, name_of, start_processes  # isort: skip

import numpy as np
from PIL import Image
from torch import Tensor

import train
from data import IGNORE, Classes, DataError
from eval import (
    SplitScores,
    add_evaluation_flags,
    evaluate,
    evaluation_loader,
    make_segment,
    metrics,
    open_for_evaluation,
    percent,
)
from model import CheckpointError

STYLE = """
:root { color-scheme: light dark; --paper: #fff; --soft: #f5f6f8; --line: #e2e5ea; --ink: #1d2127; --muted: #646c79;
  --blue: #2b6cb0; --orange: #d9691c }
@media (prefers-color-scheme: dark) { :root { --paper: #14171c; --soft: #1d2128; --line: #2e343d;
  --ink: #e6e8ec; --muted: #98a1ae; --blue: #6ba6e5; --orange: #ec9250 } }
* { box-sizing: border-box }
body { margin: 0 auto; padding: 1.5rem 1rem 4rem; max-width: 70rem; background: var(--paper); color: var(--ink);
  font: .94rem/1.5 system-ui, sans-serif; font-variant-numeric: tabular-nums; overflow-wrap: anywhere }
h1 { margin: 0; font-size: 1.7rem; line-height: 1.2 }
h2 { margin: 3rem 0 .75rem; font-size: 1.2rem }
p, figcaption, dt, thead, .key { color: var(--muted) }
h3, dl, table, figcaption { font-size: .9rem }
dl, dd, figure { margin: 0 }
dl, .charts { columns: 2 22rem; column-gap: 2.5rem }
p, figure, dl div { break-inside: avoid }
dl div { display: grid; grid-template-columns: 8rem 1fr; gap: .75rem }
img { display: block; width: 100%; border-radius: 3px }
.key { display: grid; grid-template-columns: repeat(auto-fill, minmax(9.5rem, 1fr)); gap: .75rem; margin: 1.5rem 0 }
.key div { padding: .8rem 1rem; border-radius: .5rem; background: var(--soft) }
.key b { display: block; color: var(--ink); font-size: 1.9rem; line-height: 1.25 }
svg { display: block; width: 100%; margin-top: 1rem; font-size: 12px; fill: var(--muted) }
svg line { stroke: var(--line) }
svg path { fill: none; stroke: var(--blue); stroke-width: 3; stroke-linejoin: round; stroke-linecap: round }
.blue { --hue: var(--blue) }
.orange { --hue: var(--orange) }
th i { display: inline-block; width: .75em; height: .75em; margin-right: .5em; outline: 1px solid var(--line) }
.wide { overflow-x: auto }
table { border-collapse: collapse; overflow-wrap: normal }
th { font-weight: 400; white-space: nowrap }
.classes { width: 100%; text-align: right }
.classes :is(th, td) { padding: .3rem 0 .3rem 1.2rem; border-bottom: 1px solid var(--line) }
.classes th:first-child { padding-left: 0; text-align: left }
.bar { width: 45% }
.bar div { height: .6rem; background: var(--blue) }
.confusion { border-collapse: separate; border-spacing: 1px; font-size: .8rem; text-align: center }
.confusion th { padding-right: .5rem; text-align: right }
.confusion thead th { writing-mode: vertical-rl; rotate: 180deg; padding: .4rem 0; text-align: left }
.confusion tbody td { min-width: 2.1rem; height: 2.1rem; color: var(--ink);
  background: color-mix(in srgb, var(--hue) calc(var(--heat) * .6%), var(--soft)) }
.tiles { display: grid; grid-template-columns: repeat(4, 1fr); gap: .5rem }
@media (max-width: 40rem) {
  svg { font-size: 15px }
  .tiles { grid-template-columns: 1fr 1fr }
  .classes { font-size: .75rem }
  .classes :is(th, td) { padding-left: .4rem }
}
"""

# --------------------------------------------------------------------------------------------------------------- curves


def read_curves(log: Path) -> dict[str, np.ndarray]:
    """loss and seconds over the steps, miou over the epochs: (n, 2) float64 each, from a metrics.jsonl.

    Of several records of a step or an epoch the last one counts: a resumed run repeats what came after its checkpoint.
    """
    values: dict[str, dict[int, float | None]] = {"loss": {}, "seconds": {}, "miou": {}}
    for line in log.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            record = json.loads(line)
        except ValueError:  # incomplete, as the last line of a killed run may be
            continue
        for name in values.keys() & record.keys():
            values[name][record["epoch" if name == "miou" else "step"]] = record[name]
    arrays = {name: np.array(sorted(curve.items()), float).reshape(-1, 2) for name, curve in values.items()}
    return {name: array[np.isfinite(array[:, 1])] for name, array in arrays.items()}  # None has become NaN


def chart(curve: np.ndarray, top: float, x_title: str, caption: str) -> str:
    """(n, 2) points as SVG over axes that start at 0; values above `top` are cut."""
    left, right, upper, lower = 44, 456, 8, 206
    last = max(1, curve[-1, 0])
    parts = [f'<text x="{(left + right) / 2}" y="{lower + 38}" text-anchor="middle">{x_title}</text>']
    for share in (0, 0.25, 0.5, 0.75, 1):
        x, y = left + (right - left) * share, lower - (lower - upper) * share
        parts.append(f'<line x1="{left}" x2="{right}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(f'<text x="{left - 8}" y="{y + 4:.1f}" text-anchor="end">{top * share:.4g}</text>')
        parts.append(f'<text x="{x:.1f}" y="{lower + 18}" text-anchor="middle">{last * share:.6g}</text>')
    x = left + (right - left) * curve[:, 0] / last
    y = lower - (lower - upper) * np.minimum(curve[:, 1], top) / top
    path = " ".join(f"{a:.1f},{b:.1f}" for a, b in zip(x, y))
    parts.append(f'<path d="M{path}h0"/>')  # h0: a single point becomes a dot
    svg = f'<svg viewBox="0 0 480 250" role="img">{"".join(parts)}</svg>'
    return f"<figure>{svg}<figcaption>{caption}</figcaption></figure>"


def training_curves(log: Path) -> str:
    """The charts of a run: its loss, as medians of up to 100 parts, and its mIoU in per cent."""
    curves, charts = read_curves(log) if log.is_file() else {}, []
    if len(loss := curves.get("loss", ())):
        parts = np.array_split(loss, min(len(loss), 100))
        medians = np.array([np.median(part, axis=0) for part in parts])
        caption = f"training loss, median: last {medians[-1, 1]:.4g}"
        highest = medians[:, 1].max()
        unit = 0.4 * 10.0 ** math.floor(math.log10(max(highest, 1e-9)))  # of which a quarter is a short number
        charts.append(chart(medians, unit * math.ceil(highest / unit), "step", caption))
    if len(miou := curves.get("miou", ())):
        epoch, best = max(miou, key=lambda point: point[1])
        caption = f"validation mIoU, %: best {100 * best:.2f} in epoch {epoch:.0f}"
        charts.append(chart(miou * (1, 100), 100, "epoch", caption))
    seconds = curves["seconds"][:, 1].sum() if curves else 0
    time = f"<p>Time of the training steps: {timedelta(seconds=round(seconds))}</p>" if seconds else ""
    nothing = "<p>No curves: the weights are not in the checkpoints folder of a run that has logs/metrics.jsonl.</p>"
    return f'{time}<div class="charts">{"".join(charts) or nothing}</div>'


# -------------------------------------------------------------------------------------------------- tables and pictures


def class_table(result: dict, confusion: np.ndarray, classes: Classes) -> str:
    """IoU of each class as bar and number, recall, precision, share of the labelled pixels, and iIoU."""
    truth, predicted, total = confusion.sum(1), confusion.sum(0), confusion.sum()
    class_iiou = result.get("class_iiou")
    titles = ["class, in %", "", "IoU", "recall", "precision", "pixels"] + (["iIoU"] if class_iiou else [])
    rows = ["".join(f"<th>{title}</th>" for title in titles)]
    for i, name in enumerate(classes.names):
        iou, hits = result["class_iou"][name], confusion[i, i]
        ratios = ((hits, truth[i]), (hits, predicted[i]), (truth[i], total))
        values = [iou, *(part / of if of else None for part, of in ratios)]
        values += [class_iiou.get(name)] if class_iiou else []
        bar = f'<td class="bar"><div style="width:{100 * (iou or 0):.2f}%"></div></td>'
        cells = "".join(f"<td>{percent(value)}</td>" for value in values)
        swatch = f'<i style="background:rgb{tuple(classes.colours[i])}"></i>'
        rows.append(f"<th>{swatch}{escape(name)}</th>{bar}{cells}")
    note = "<p>iIoU is the IoU in which every object counts as if it had the average size of its class.</p>"
    return table("classes", rows) + (note if class_iiou else "")


def confusion_table(confusion: np.ndarray, names: Sequence[str]) -> str:
    """A row for each class of the truth: the share of its pixels that each class was predicted for, in per cent."""
    rows = ["<td>truth ↓ &nbsp;predicted →, in %</td>" + "".join(f"<th>{escape(name)}</th>" for name in names)]
    for i, name in enumerate(names):
        cells = [f"<th>{escape(name)}</th>"]
        for j, share in enumerate(100 * confusion[i] / max(1, confusion[i].sum())):
            colour = "blue" if i == j else "orange"
            heat = 10 * math.sqrt(share)  # the root makes small shares visible
            text = f"{share:.0f}" if share >= 0.5 else ""
            cells.append(f'<td class="{colour}" style="--heat:{heat:.0f}">{text}</td>')
        rows.append("".join(cells))
    return table("confusion", rows)


def table(style: str, rows: Sequence[str]) -> str:
    """A table of rows of cells, the first of which is its head."""
    head, *body = (f"<tr>{row}</tr>" for row in rows)
    return f'<div class="wide"><table class="{style}"><thead>{head}</thead><tbody>{"".join(body)}</tbody></table></div>'


def definitions(values: dict[str, object]) -> str:
    """Names and values as a list, without those that are None or empty."""
    rows = []
    for name, value in values.items():
        text = " ".join(map(str, value)) if isinstance(value, list) else str(value)
        if value is not None and text:
            rows.append(f"<div><dt>{escape(name)}</dt><dd>{escape(text)}</dd></div>")
    return f"<dl>{''.join(rows)}</dl>"


def data_uri(picture: Image.Image, kind: str) -> str:
    """The picture, at most 480 pixels wide, as text within the page."""
    picture.thumbnail((480, 1920), Image.Resampling.BOX)
    file = io.BytesIO()
    picture.save(file, kind, quality=85)
    return f"data:image/{kind};base64,{base64.b64encode(file.getvalue()).decode()}"


def pictures(image: Tensor, label: Tensor, prediction: Tensor, classes: Classes) -> dict[str, str]:
    """{caption: data URI} of (H, W, 3) uint8 RGB and two (H, W) uint8 label maps."""
    photograph = Image.fromarray(image.numpy())
    label, prediction = label.numpy(), prediction.cpu().numpy()
    errors = np.array(photograph.convert("L").convert("RGB")) // 2 + 96
    errors[label != prediction] = 224, 108, 30
    errors[label == IGNORE] = 0
    return {
        "image": data_uri(photograph, "jpeg"),
        "truth": data_uri(classes.colour_map(label), "png"),
        "prediction": data_uri(classes.colour_map(prediction), "png"),
        "errors": data_uri(Image.fromarray(errors), "jpeg"),
    }


def worst_images(rows: Sequence[tuple[str, float, float, dict[str, str]]]) -> str:
    """Rows of name, pixel accuracy, mIoU and `pictures`."""
    parts = ["<p>Those with the lowest pixel accuracy. Errors are orange, pixels without a label black.</p>"]
    for name, accuracy, miou, tiles in rows:
        parts.append(f"<h3>{escape(name)} pixel accuracy {percent(accuracy)} %, mIoU {percent(miou)} %</h3>")
        figures = (
            f'<figure><img src="{uri}" alt="{caption} of {escape(name)}"><figcaption>{caption}</figcaption></figure>'
            for caption, uri in tiles.items()
        )
        parts.append(f'<div class="tiles">{"".join(figures)}</div>')
    return "".join(parts)


def make_page(title: str, result: dict, facts: dict[str, object], sections: dict[str, str]) -> str:
    """The page as HTML: key figures, facts, and sections, {heading: HTML}."""
    names = {"miou": "mIoU", "pixel_accuracy": "pixel accuracy", "miiou": "iIoU", "category_miou": "mIoU of categories"}
    key = [f"<div><b>{percent(result[key])} %</b>{names[key]}</div>" for key in names if result.get(key) is not None]
    body = [f'<h1>{escape(title)}</h1><div class="key">{"".join(key)}</div>{definitions(facts)}']
    body += [f"<h2>{heading}</h2>\n{section}" for heading, section in sections.items() if section]
    body = "\n".join(body)
    head = f'<meta charset="utf-8"><meta name="viewport" content="width=device-width"><title>{escape(title)}</title>'
    return f'<!doctype html>\n<html lang="en"><head>{head}<style>{STYLE}</style></head>\n<body>{body}</body></html>\n'


def get_args_parser() -> argparse.ArgumentParser:
    """The command line of tools/report.py."""
    parser = OneLineParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_evaluation_flags(parser)
    parser.add_argument("--out", metavar="FILE", help="the page (default: beside the weights, under their name)")
    return parser


def main(argv: list[str] | None = None) -> None:
    """Writes the page as the command line says."""
    args = get_args_parser().parse_args(argv)
    args.out = args.out or str(Path(args.weights).with_suffix(".html"))
    checkpoint, model, dataset = open_for_evaluation(args)
    device, _, _ = start_processes(args.device)
    segment = make_segment(args, model, device)
    Path(args.out).parent.mkdir(parents=True, exist_ok=True)  # rather now than after the evaluation
    scores, accuracies = SplitScores(dataset), []
    for index, _, label, prediction in evaluate(segment, evaluation_loader(dataset, args.workers)):
        figures = metrics(scores.add(index, label, prediction), dataset.classes)
        if figures["miou"] is not None:
            accuracies.append((figures["pixel_accuracy"], figures["miou"], index))
    result, classes, confusion, worst = scores.metrics(), dataset.classes, scores.confusion.numpy(), []
    for accuracy, miou, index in sorted(accuracies)[:6]:
        image, label = dataset[index]
        tiles = pictures(image, label, segment(image[None])[0], classes)
        worst.append((str(dataset.samples[index].image.relative_to(args.data)), accuracy, miou, tiles))
    facts = {
        "weights": args.weights + (f", epoch {checkpoint['epoch']}" if "epoch" in checkpoint else ""),
        "data": f"{args.data}, {args.dataset} {args.split}, {len(dataset)} images",
        "device": f"{name_of(device)}, precision {args.amp}",
    }
    facts |= {"scales": args.scales, "flip": args.flip, "window": args.window}
    defaults = vars(train.get_args_parser().parse_args([]))
    settings = {name: value for name, value in checkpoint.get("args", {}).items() if value != defaults.get(name)}
    sections = {
        "Training": training_curves(Path(args.weights).resolve().parents[1] / "logs" / "metrics.jsonl"),
        "Classes": class_table(result, confusion, classes),
        "Confusion matrix": confusion_table(confusion, classes.names),
        "Worst images": worst_images(worst) if worst else "",
        "Settings of the training that are not defaults": definitions(settings),
    }
    page = make_page(f"Fast-SCNN on {Path(args.data).resolve().name}, {args.split}", result, facts, sections)
    Path(args.out).write_text(page, encoding="utf-8", errors="backslashreplace")  # file names may be no text
    print(f"wrote {args.out}")
    print(json.dumps({"report": args.out, "images": len(dataset), "miou": result["miou"]}), flush=True)


if __name__ == "__main__":
    sys.exit(exit_status(main, (DataError, CheckpointError)))
