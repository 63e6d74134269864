"""`fallow export RUN --to TARGET`: a finished run's model, or any model folder, written, verified and measured."""

from __future__ import annotations

import json
from pathlib import Path

from fallow.cli import VerbParser
from fallow.errors import ConfigError
from fallow.exporting import TARGETS, Exported, export


def export_command(argv: list[str]) -> int:
    """Write the export and print its sizes. Raises ConfigError where RUN holds no finished run and no model."""
    args = _parser().parse_args(argv)
    from fallow.training.finished import find_model, has_method, restore_method

    base, source = find_model(args.run, verb="export")
    output = args.output or base / f"export-{args.to}"
    if source.resolve().is_relative_to(output.expanduser().resolve()):
        raise ConfigError(f"export: {output} holds the model that is to be exported; choose another --output")
    from fallow.exporting.stock import load_folder
    from fallow.training.quiet import quiet

    quiet()
    model, tokenizer = load_folder(source)
    handle = getattr(model, "_fallow", None)  # an exported Upcycle model has it
    if handle is None and args.to not in ("hf", "packed") and has_method(source):
        handle = restore_method(model, source, verb="export")
    if handle is not None:
        handle.set_mode("dense" if args.dense else "sparse")
    done = export(model, output, to=args.to, tokenizer=tokenizer, overwrite=args.overwrite, int8=args.int8)
    if args.json:
        print(json.dumps({"source": str(source), **done.as_dict()}))
    else:
        print("\n".join(lines(done)))
    return 0


def lines(done: Exported) -> list[str]:
    """What is printed of an export."""
    packed = f", {done.packed_layers} layers packed" if done.packed_layers else ""
    return [
        f"{done.path} ({done.to}: {TARGETS[done.to]})",
        f"dense     {done.dense_bytes:,} bytes of weights",
        f"written   {done.weight_bytes:,} bytes of weights ({done.ratio:.3f} of dense{packed}),"
        f" {sum(done.files.values()):,} bytes in {len(done.files)} files",
        *(f"verified  {line}" for line in done.verified),
    ]


def _parser() -> VerbParser:
    parser = VerbParser(
        prog="fallow export",
        description=(__doc__ or "").split("\n")[0],
        epilog="targets: " + "; ".join(f"{name}: {what}" for name, what in TARGETS.items()),
    )
    parser.add_argument("run", type=Path, metavar="RUN", help="a finished run's folder, or one with a model")
    parser.add_argument("--to", required=True, choices=list(TARGETS), help="what to write")
    parser.add_argument("--output", type=Path, metavar="DIR", help="default: RUN/export-TARGET")
    parser.add_argument("--dense", action="store_true", help="gguf: all neurons, although the run is sparse")
    parser.add_argument("--int8", action="store_true", help="fallow: FFN weights in 8 bits")
    parser.add_argument("--overwrite", action="store_true", help="replace an earlier export")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    return parser
