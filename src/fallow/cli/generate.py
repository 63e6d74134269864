"""`fallow generate MODEL --prompt TEXT`: a text, dense or sparse, and how fast its tokens came."""

from __future__ import annotations

import json
import sys
from typing import TYPE_CHECKING, Any

from fallow.cli import VerbParser
from fallow.errors import ConfigError

if TYPE_CHECKING:
    from fallow.evaluation.subject import Subject
    from fallow.serving import Generated


def generate_command(argv: list[str]) -> int:
    """Continue a prompt and print it. Raises ConfigError before a token is computed."""
    args = _parser().parse_args(argv)
    if args.max_new_tokens < 1:
        raise ConfigError(f"--max-new-tokens {args.max_new_tokens} must be 1 or more")
    prompt = sys.stdin.read() if args.prompt == "-" else args.prompt
    if not prompt.strip():
        raise ConfigError("--prompt is empty; give some text, or - to read it from standard input")
    from fallow.cli.evaluate import load_subject, say
    from fallow.serving import Decoder, Sampling

    sampling = Sampling(temperature=args.temperature, top_p=args.top_p, seed=args.seed)
    subject = load_subject(args, verb="generate")
    mode = args.mode or ("dense" if subject.sparsity is None else "sparse")
    ids = [int(i) for i in subject.tokenizer(prompt)["input_ids"]]
    if not ids:
        raise ConfigError("generate: the tokenizer makes no token of that prompt; give a longer one")
    places = len(ids) + args.max_new_tokens
    subject.check_length(places, f"generate: {len(ids)} prompt tokens and {args.max_new_tokens} new ones")
    decoder = Decoder(subject.model, max_tokens=places, compiled=not args.eager, say=say)
    found = []
    for one in ("dense", "sparse") if mode == "both" else (mode,):
        write = _Writer(subject, stream=args.stream and not args.json)
        if mode == "both" and not args.json:
            print(f"{'' if one == 'dense' else chr(10)}[{one}]")
        with subject.evaluated(one):
            text = decoder.generate(
                ids,
                max_new_tokens=args.max_new_tokens,
                sampling=sampling,
                stop_tokens=() if args.no_stop else None,
                on_token=write.token,
            )
        found.append(_figures(one, text, decoder.note) | {"text": write.end(text.tokens, shown=not args.json)})
    if args.json:
        print(json.dumps({"model": subject.about, "prompt": prompt, "generated": found}))
    else:
        print("\n" + "\n".join(_line(f) for f in found))
        if len(found) == 2 and all(f["tokens_per_second"] for f in found):
            ratio = found[1]["tokens_per_second"] / found[0]["tokens_per_second"]
            print(f"sparse is {ratio:.2f} times as fast, timed once each; `fallow bench upcycle` times by turns")
    return 0


class _Writer:
    """Prints the text while it grows, or at its end."""

    def __init__(self, subject: Subject, *, stream: bool) -> None:
        from transformers import TextStreamer

        self._tokenizer: Any = subject.tokenizer
        self._streamer = TextStreamer(self._tokenizer, skip_special_tokens=True) if stream else None

    def token(self, token: int) -> None:
        if self._streamer is not None:
            import torch

            self._streamer.put(torch.tensor([token]))

    def end(self, tokens: list[int], *, shown: bool) -> str:
        """The whole text."""
        text = self._tokenizer.decode(tokens, skip_special_tokens=True)
        if self._streamer is not None:
            self._streamer.end()
        elif shown:
            print(text)
        return text


def _figures(mode: str, text: Generated, note: str) -> dict[str, Any]:
    return {
        "mode": mode,
        "tokens": len(text.tokens),
        "tokens_per_second": text.tokens_per_second,
        "prompt_tokens": text.prompt_tokens,
        "prefill_seconds": text.prefill_seconds,
        "compile_seconds": text.compile_seconds,
        "stopped": text.stopped,
        "loop": note,
    }


def _line(figures: dict[str, Any]) -> str:
    """What is printed of one text's speed."""
    speed = figures["tokens_per_second"]
    rate = "too few tokens to time" if speed is None else f"{speed:.1f} tokens/s"
    spent = f"first token after {figures['prefill_seconds']:.2f} s"
    if figures["compile_seconds"]:
        spent += f", compiled in {figures['compile_seconds']:.0f} s"
    return f"{figures['mode']}: {figures['tokens']} tokens, {rate} ({figures['loop']}; {spent})"


def _parser() -> VerbParser:
    from fallow.cli.evaluate import add_subject

    parser = VerbParser(
        prog="fallow generate",
        description=(__doc__ or "").split("\n")[0],
        epilog="tokens/s is of decoding: without the prompt, its first token and compilation.",
    )
    add_subject(parser)
    parser.add_argument("--prompt", required=True, metavar="TEXT", help="what is continued; - reads standard input")
    parser.add_argument("--max-new-tokens", type=int, default=64, metavar="N", help="at most so many (64)")
    parser.add_argument("--mode", choices=("dense", "sparse", "both"), help="default: sparse where the model is")
    parser.add_argument("--stream", action="store_true", help="print words as they come")
    parser.add_argument("--temperature", type=float, default=0.0, metavar="T", help="0 (default) takes the likeliest")
    parser.add_argument("--top-p", type=float, default=1.0, metavar="P", help="draw from this much probability (1)")
    parser.add_argument("--seed", type=int, metavar="N", help="of the draws")
    parser.add_argument("--no-stop", action="store_true", help="go on to --max-new-tokens past the end of the text")
    parser.add_argument("--eager", action="store_true", help="do not compile: a quicker start, slower tokens")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    return parser
