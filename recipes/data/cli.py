"""The parser of `lavin data`; what its commands import is imported when they run."""


def add_data_parser(commands):
    """Adds `lavin data` to the subcommands of `lavin`."""
    parser = commands.add_parser("data", help="prepare a data set for `trl sft`")
    kinds = parser.add_subparsers(dest="kind", required=True, metavar="KIND")

    scienceqa = kinds.add_parser("scienceqa", help="ScienceQA, its official files or its form on the Hub")
    scienceqa.add_argument(
        "--root", required=True, metavar="DIR", help="holds problems.json, or data/<split>-*.parquet"
    )
    scienceqa.add_argument("--split", default="train", metavar="NAME", help="train, val, test, ... (train by default)")
    scienceqa.add_argument(
        "--format",
        default="QCM-ALE",
        metavar="IN-OUT",
        help="orders of prompt and answer: QCM-ALE (default), CQM-A, ...",
    )
    scienceqa.add_argument("--captions", action="store_true", help="add the images' captions to the context")
    _shared_options(scienceqa)
    scienceqa.set_defaults(run=run_scienceqa)

    instructions = kinds.add_parser("instructions", help="Alpaca and LLaVA-Instruct JSON, single- and multi-turn")
    instructions.add_argument(
        "--input", required=True, action="append", dest="inputs", metavar="FILE",
        help=".json or .jsonl; may be given several times",
    )  # fmt: skip
    instructions.add_argument("--image-root", metavar="DIR", help="what the images' names are relative to")
    _shared_options(instructions)
    instructions.set_defaults(run=run_instructions)

    caption = kinds.add_parser("caption", help="COCO captions, and Karpathy's split of them")
    caption.add_argument(
        "--annotations", required=True, metavar="FILE", help="captions_train2014.json or dataset_coco.json"
    )
    caption.add_argument(
        "--split", default="train", metavar="NAME", help="of Karpathy's file: train (default), val, test"
    )
    caption.add_argument("--prompt", metavar="TEXT", help="what is asked, instead of ours")
    _image_options(caption)
    caption.set_defaults(run=run_caption)

    vqa = kinds.add_parser("vqa", help="VQAv2, OK-VQA, TextVQA, GQA, OCR-VQA")
    vqa.add_argument("--questions", required=True, metavar="FILE", help="the questions as they are published")
    vqa.add_argument("--annotations", metavar="FILE", help="the answers, of VQAv2 and OK-VQA")
    vqa.add_argument("--split", default="train", metavar="NAME", help="of OCR-VQA: train (default), val, test")
    _image_options(vqa)
    vqa.set_defaults(run=run_vqa)

    grounding = kinds.add_parser("grounding", help="RefCOCO, RefCOCO+, RefCOCOg: a phrase and its box")
    grounding.add_argument(
        "--input", required=True, action="append", dest="inputs", metavar="FILE",
        help="MDETR's .json or Qwen-VL's .jsonl; may be given several times",
    )  # fmt: skip
    grounding.add_argument("--decimals", type=int, default=3, metavar="N", help="of a coordinate (3)")
    _image_options(grounding)
    grounding.set_defaults(run=run_grounding)

    pope = kinds.add_parser("pope", help="POPE: is there such a thing in the image?")
    pope.add_argument(
        "--input", required=True, action="append", dest="inputs", metavar="FILE",
        help="coco_pope_random.json, ...; may be given several times",
    )  # fmt: skip
    _image_options(pope)
    pope.set_defaults(run=run_pope)


def _image_options(parser):
    parser.add_argument("--image-root", required=True, metavar="DIR", help="what the images' names are relative to")
    _shared_options(parser)


def _shared_options(parser):
    parser.add_argument("--output", required=True, metavar="DIR", help="where the Parquet files go")
    parser.add_argument("--skip-bad", action="store_true", help="leave bad entries out and list them; otherwise stop")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="seed of the order of the rows (0)")
    parser.add_argument("--num-proc", type=int, default=1, metavar="N", help="processes that check images (1)")


def run_scienceqa(kind, root, split, format, output, captions, skip_bad, seed, num_proc):
    from .prepare import prepare
    from .scienceqa import ScienceQA

    report(prepare(ScienceQA(root, split, format, captions), output, split, seed, num_proc, skip_bad))


def run_instructions(kind, inputs, image_root, output, skip_bad, seed, num_proc):
    from .instructions import Instructions
    from .prepare import prepare

    report(prepare(Instructions(inputs, image_root), output, "train", seed, num_proc, skip_bad))


def run_caption(kind, annotations, split, prompt, image_root, output, skip_bad, seed, num_proc):
    from .captions import PROMPT, Captions
    from .prepare import prepare

    source = Captions(annotations, image_root, split, PROMPT if prompt is None else prompt)
    report(prepare(source, output, split, seed, num_proc, skip_bad))


def run_vqa(kind, questions, annotations, split, image_root, output, skip_bad, seed, num_proc):
    from .prepare import prepare
    from .vqa import VQA

    report(prepare(VQA(questions, image_root, annotations, split), output, split, seed, num_proc, skip_bad))


def run_grounding(kind, inputs, decimals, image_root, output, skip_bad, seed, num_proc):
    from .grounding import Grounding
    from .prepare import prepare

    report(prepare(Grounding(inputs, image_root, decimals), output, "train", seed, num_proc, skip_bad))


def run_pope(kind, inputs, image_root, output, skip_bad, seed, num_proc):
    from .pope import POPE
    from .prepare import prepare

    report(prepare(POPE(inputs, image_root), output, "train", seed, num_proc, skip_bad))


def report(made):
    """Prints what was written, what was left out, and the lines of a recipe that read it."""
    from .prepare import by_kind

    size = sum(path.stat().st_size for path in made.files) / 1e6
    files = "1 file" if len(made.files) == 1 else f"{len(made.files)} files"
    print(f"Wrote {made.rows:,} rows with {made.images:,} images to {made.pattern} ({files}, {size:,.1f} MB).")
    if made.skipped:
        print(f"Skipped {made.skipped.total():,} of {made.entries:,} entries: {by_kind(made.skipped)}:")
        more = made.skipped.total() - len(made.first)
        print("\n".join(f"  {said}" for said in made.first) + (f"\n  ... and {more:,} more" if more else ""))
        print(f"All of them are listed in {made.skipped_file}.")
    print(f"In a recipe for `trl sft`:\n\ndatasets:\n  - path: parquet\n    data_files: {made.pattern}")
