"""What `lisa-ds evaluate` does, one function for each thing that it measures; all mistakes are found before weights are read."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch.distributed as dist
from transformers.utils import logging

from lisa_ds import data
from lisa_ds.cluster.facts import device_name, devices
from lisa_ds.errors import ConfigError
from lisa_ds.evaluate import answers as judged
from lisa_ds.evaluate import harness, results
from lisa_ds.evaluate import loss as held_out
from lisa_ds.evaluate import samples as before_and_after
from lisa_ds.evaluate.opened import Opened, open_subject
from lisa_ds.evaluate.subject import before_training, find, settings
from lisa_ds.train import stages

_BATCH_SIZE = 8


def loss(arguments: argparse.Namespace) -> None:
    """Measure the held-out loss, on all ranks that a launcher has started.

    Raises:
        LisaError: Something is wrong with model, data or settings.
    """
    opened = _open(arguments, any_text=False)
    task = opened.config.model.task
    with held_out.process_group() as rank:
        stages.begin(f"reading and tokenising the held-out rows of {_data_source(opened)}")
        rows = held_out.held_out_rows(opened)
        stages.begin(f"loading the weights of {opened.subject.name}")
        model = opened.load(arguments.dtype)
        stages.begin(f"measuring the held-out loss on {len(rows):,} rows")
        found = held_out.measure(
            model,
            rows,
            data.collator(opened.tokenizer, pad_to_multiple_of=opened.config.data.pad_to_multiple_of, task=task),
            task=task,
            batch_size=arguments.batch_size or _BATCH_SIZE,
        )
        if rank == 0:
            print(*results.loss_lines(found), sep="\n")
            own = {"data": opened.config.data.model_dump(mode="json"), "digest": data.digest(rows)}
            _record(arguments, opened, model, list(results.loss_values(found)), own)


def tasks(arguments: argparse.Namespace) -> None:
    """Run tasks of lm-evaluation-harness.

    Raises:
        LisaError: Something is wrong with model, tasks or settings.
    """
    names = [name.strip() for name in arguments.tasks.split(",") if name.strip()]
    harness.check(names, arguments.data_dir)
    opened = _open(arguments, any_text=True)
    if arguments.apply_chat_template and not opened.tokenizer.chat_template:
        raise ConfigError(f"--apply-chat-template: the tokenizer of {opened.subject.name} has no chat template")
    stages.begin(f"loading the data of {', '.join(names)}")
    loaded = harness.load(names, arguments.data_dir, arguments.num_fewshot)
    stages.begin(f"loading the weights of {opened.subject.name}")
    model = opened.load(arguments.dtype)
    stages.begin(f"asking {opened.subject.title}")
    scores = harness.run(
        model,
        opened.tokenizer,
        loaded,
        batch_size=arguments.batch_size or _BATCH_SIZE,
        limit=arguments.limit,
        apply_chat_template=arguments.apply_chat_template,
    )
    print(*results.score_lines(scores), sep="\n")
    own = {name: getattr(arguments, name) for name in ("limit", "apply_chat_template")}
    _record(arguments, opened, model, list(results.score_values(scores)), own)


def answers(arguments: argparse.Namespace) -> None:
    """Answer questions for a judge.

    Raises:
        LisaError: Something is wrong with model, questions or settings.
    """
    questions = judged.read_questions(arguments.answers)
    opened = _open(arguments, any_text=True)
    model_id = arguments.model_id or opened.subject.title
    judged.read_answers(arguments.out, model_id)
    judged.check_template(opened.tokenizer, opened.subject.name)
    stages.begin(f"loading the weights of {opened.subject.name}")
    model = opened.load(arguments.dtype)
    stages.begin(f"asking {model_id} the {len(questions)} questions of {arguments.answers}")
    judged.answer_questions(
        model,
        opened.tokenizer,
        questions,
        arguments.out,
        model_id=model_id,
        max_new_tokens=arguments.max_new_tokens or judged.MAX_NEW_TOKENS,
        tell=lambda text: print(text, flush=True),
    )
    print(f"wrote {arguments.out}")


def samples(arguments: argparse.Namespace) -> None:
    """Ask a run's model the same before and after training.

    Raises:
        LisaError: Something is wrong with the run, its models or the prompts.
    """
    prompts = before_and_after.read_prompts(arguments.samples)
    opened = _open(arguments, any_text=True)
    base = before_training(opened.subject, arguments.lisa_config)
    untrained = open_subject(base, settings(base, arguments.lisa_config, arguments.overrides), any_text=True)

    def load(what: Opened, when: str) -> Any:
        stages.begin(f"asking the model {when} training")
        return what.load(arguments.dtype)

    found = before_and_after.ask(
        lambda: load(untrained, "before"),
        lambda: load(opened, "after"),
        opened.tokenizer,
        prompts,
        arguments.max_new_tokens or 128,
    )
    assert base.run is not None
    print(f"wrote {before_and_after.write(base.run, found)}")


def _open(arguments: argparse.Namespace, *, any_text: bool) -> Opened:
    logging.disable_progress_bar()
    keys = (word.partition("=")[0] for word in arguments.overrides)
    if any_text and (idle := [key for key in keys if key.startswith("data.") and key != "data.chat_template"]):
        raise ConfigError(f"command line: {idle[0]}: no rows of the run are read here; leave it out")
    subject = find(arguments.model)
    config = settings(subject, arguments.lisa_config, arguments.overrides)
    opened = open_subject(subject, config, any_text=any_text)
    if any_text:
        data.set_chat_template(opened.tokenizer, config.data)
    return opened


def _data_source(opened: Opened) -> str:
    section = opened.config.data
    return section.eval_path or section.path


def _record(arguments: argparse.Namespace, opened: Opened, model: Any, values: list[results.Value], own: Any) -> None:
    if arguments.out is None:
        return
    ranks = dist.get_world_size() if dist.is_initialized() else 1
    shared = {
        "model": arguments.model,
        "base": opened.subject.model if opened.subject.adapter else None,
        "dtype": str(model.dtype).removeprefix("torch."),
        "batch_size": arguments.batch_size or _BATCH_SIZE,
        "ranks": ranks,
        **own,
    }
    device = device_name() if ranks == 1 else devices(ranks)
    left_out = results.write(Path(arguments.out), opened.subject.title, device, values, shared)
    if left_out:
        print(f"not written, because JSON has no word for what is not a finite number: {', '.join(left_out)}")
    if left_out != [name for name, *_ in values]:
        print(f"wrote {arguments.out}")
