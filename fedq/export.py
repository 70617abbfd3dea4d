"""Writes a run's model to a folder that other programs load.

python -m fedq.export RUN --to FOLDER     (installed: fedq-export RUN --to FOLDER)
"""

import argparse
import json
import sys
from pathlib import Path

import torch
from omegaconf import OmegaConf

from fedq.config import build, build_protocol
from fedq.errors import FedqError
from fedq.learning.parts import load
from fedq.learning.protocol import Protocol
from fedq.pretrained import library
from fedq.simulation import checkpoint


def export(run: Path, to: Path) -> str:
    """Writes the model of a run to the folder `to`, and returns a line that says how to load the model.

    run: A checkpoint, or the folder of a run for the newest checkpoint. The configuration in a checkpoint names the
        classes that are built: export runs that you trust.
    to: A new folder, or an empty one.

    A model with adapters becomes an adapter of peft, and another model of transformers a model of transformers. Every
    other model becomes `model.safetensors`, the state_dict without tied names, and `config.json`. Tensors that clients
    keep (algorithm.personal) have the first weights.

    Raises FedqError if there is no usable checkpoint, if the folder is not empty, and if a package is missing.
    """
    if to.exists() and not (to.is_dir() and not any(to.iterdir())):
        raise FedqError(f"{to} is not empty: give a new folder")
    library("fedq.export", "safetensors")
    paths = [run] if run.is_file() else sorted((run / "checkpoints").glob("round_*.pt"))
    if not paths:
        raise FedqError(f"{run} holds no checkpoint")
    state, config = checkpoint.load(paths[-1])
    cfg = OmegaConf.create(config)
    dataset = build(cfg, "dataset")
    protocol = Protocol(**build_protocol(cfg, dataset, torch.device("cpu")))
    try:
        weights = protocol.with_base(state).weights
        load(protocol.model, protocol.without_shared(weights))
    except (FedqError, RuntimeError) as error:
        raise FedqError(f"{paths[-1]}: {error}") from error
    model, target = protocol.model, config["model"]["_target_"]
    if hasattr(model, "peft_config"):
        # without the option, peft asks the hub whether the base has other embeddings
        model.save_pretrained(str(to), save_embedding_layers=False)  # type: ignore[operator]  # nn.Module hides the type
        return f"load: peft.PeftModel.from_pretrained(BASE, {str(to)!r}), where BASE is {config['model']['base']}"
    if hasattr(model, "save_pretrained"):
        model.save_pretrained(str(to))  # type: ignore[operator]  # nn.Module hides the type
        return f"load: transformers.AutoModel….from_pretrained({str(to)!r})"
    from safetensors.torch import save_file

    to.mkdir(parents=True, exist_ok=True)
    ties = protocol.parts.tied
    save_file({n: value.contiguous() for n, value in weights.items() if n not in ties}, to / "model.safetensors")
    described = {"model": config["model"], "num_classes": dataset.num_classes, "tied": ties}
    (to / "config.json").write_text(json.dumps(described, indent=2) + "\n")
    return f"load: safetensors.torch.load_file({str(to / 'model.safetensors')!r}), a state_dict of {target}"


def main() -> None:
    """Runs the command line."""
    parser = argparse.ArgumentParser("fedq-export", description="Writes a run's model for use in other programs.")
    parser.add_argument("run", type=Path, metavar="RUN", help="a run's folder, or a checkpoint")
    parser.add_argument("--to", type=Path, required=True, metavar="FOLDER", help="a new folder")
    args = parser.parse_args()
    try:
        print(export(args.run, args.to))
    except (FedqError, OSError) as error:
        sys.exit(f"fedq: {error}")


if __name__ == "__main__":
    main()
