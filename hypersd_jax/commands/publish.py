"""``hypersd publish``."""

from __future__ import annotations

import argparse
import re
import sys
from typing import Any

from hypersd_jax.commands import parsing
from hypersd_jax.config import load_run, utf8
from hypersd_jax.errors import UserError
from hypersd_jax.publishing.licence import find_licence
from hypersd_jax.publishing.target import check_target

_REPO = re.compile(r"\w[\w.-]*/\w[\w.-]*")


def add_parser(commands: Any) -> None:
    """Declare the command."""
    parser = commands.add_parser(
        "publish",
        help="put a run's LoRAs on the Hugging Face hub",
        description="Write a model card with settings, reference images and results, and upload it with the LoRAs of a "
        "run, through huggingface_hub (HF_TOKEN, HF_ENDPOINT).",
        epilog="example:\n  hypersd publish outputs/emoji owner/name --dry-run\n",
    )
    parser.add_argument("folder", type=parsing.path, metavar="DIR", help="a run's output folder")
    parser.add_argument("repo", metavar="REPO", help="owner/name on the hub")
    parser.add_argument("--dry-run", action="store_true", help="write the folder, upload nothing, ask for nothing")
    parser.add_argument(
        "--output", type=parsing.path, metavar="FOLDER", help="where the folder is written (default: DIR/publish)"
    )
    parser.add_argument("--license", metavar="ID", help="the hub's id of the licence (default: the base's, if known)")
    parser.add_argument("--base-model", metavar="OWNER/NAME", help="the base's id on the hub, if it was a local one")
    parser.add_argument("--private", action="store_true", help="a repository that nobody else sees")
    parser.add_argument("--images", type=parsing.whole(0), default=4, metavar="N", help="reference images of each LoRA")
    parser.add_argument("--prompt", action="append", help="of the reference images; may be given several times")
    parser.add_argument("--seed", type=parsing.seed, default=0, metavar="N|random", help="of the first (default: 0)")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> None:
    """Write the folder, upload it, and print the files or the address."""
    for name, value in (("REPO", options.repo), ("--base-model", options.base_model)):
        if value is not None and not _REPO.fullmatch(value):
            raise UserError(f"{name} {value}: must be owner/name, as the hub has it")
    prompts = [utf8(prompt, "--prompt") for prompt in options.prompt or ()]
    config = load_run(options.folder)
    licence, licence_is = find_licence(options.license, config.model.source, options.base_model)
    target = options.output or options.folder / "publish"
    check_target(target)
    if not options.dry_run:
        from hypersd_jax.publishing.upload import require_login

        require_login(options.repo)

    from hypersd_jax.publishing.publish import write_publication

    settings = {"prompts": prompts, "images": options.images, "seed": options.seed, "base_model": options.base_model}
    how = {"licence": licence, "licence_is": licence_is, **settings}
    files, left_out = write_publication(options.folder, config, target, options.repo, **how)
    for reason in left_out:
        print(f"left out: {reason}", file=sys.stderr)
    if options.dry_run:
        print("\n".join(map(str, files)))
        return

    from hypersd_jax.publishing.upload import upload

    print(upload(target, options.repo, private=options.private))
