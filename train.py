"""Train or fine-tune a language model from one TOML file: the whole story, top to bottom.

    python train.py train_configs/debug_model.toml
    NGPU=2 ./run_train.sh --training.steps 50
    CONFIG=smollm2_135m_full ./run_train.sh --checkpoint.export_dtype float32

Paragraphs: wake · arrange the machines · words · know the model, on paper · data · how the weights leave · memory of the run ·
spread the model · give weights · optimizer · resume · watch · the loop · close; then `train_step` and `evaluate`. Everything that a person can
have got wrong is found before the first weight is allocated. Nothing imports this file.
"""

import contextlib
import json
import math
import os
import sys
import time
from pathlib import Path
from typing import Any, NoReturn

import torch

from tunelib.adapters import add_adapters
from tunelib.checkpoint.identity import check_base, check_identity, describe_identity
from tunelib.checkpoint.manager import CheckpointManager
from tunelib.checkpoint.progress import Progress
from tunelib.checkpoint.state import RunState, model_tensors
from tunelib.config import check_own_config, describe_changes, load_or_exit, resolve_dump_folder, resolve_local_batch_size, resolved_toml
from tunelib.config.resolve import find_what_rules_out_compile
from tunelib.data.loader import HeldOutData, Share, Step, TrainData
from tunelib.data.prepare import Batches, HeldOut, build_documents, build_train_data, find_words
from tunelib.data.stream import Ranks, StreamData
from tunelib.data.tokenizer import Tokenizer
from tunelib.errors import CheckpointError, Stopped, TunelibError
from tunelib.files import replace_file
from tunelib.flops import step_flops
from tunelib.formats.load import check_weights, check_weights_path, fill, find_tokenizer_folder, find_weights, plan_export_of
from tunelib.formats.peft import check_adapter, export_adapter, open_adapter, trained_shapes
from tunelib.formats.prove import describe_export, export_model
from tunelib.formats.source import expected_shapes
from tunelib.infer.generate import answer_prompts, encode_prompts
from tunelib.infer.harness import describe_scores, open_exam
from tunelib.infer.score import build_crew
from tunelib.model.decoder import Decoder, build_on_meta
from tunelib.observe.console import Console
from tunelib.observe.memory import peak_memory_gib
from tunelib.observe.metrics import NONFINITE_FILE, SAMPLES_FILE, RowWriter
from tunelib.observe.profile import Profiler, mark
from tunelib.observe.report import describe_documents, opening_lines
from tunelib.observe.sinks import check_sinks, open_metrics
from tunelib.observe.summary import Outputs, Summary, what_is_trained
from tunelib.optimizer import build_optimizer, set_lr
from tunelib.parallel.apply import spread_model
from tunelib.parallel.compile import check_compiled_step, choose_compile
from tunelib.parallel.fsdp import forward_only
from tunelib.parallel.mesh import Layout, build_layout
from tunelib.parallel.pipeline import Pipeline, plan_stages
from tunelib.parallel.reduce import agree, agreed, any_rank, check_same, clip_gradients, largest_of_ranks, sum_over_ranks
from tunelib.parallel.runtime import DTYPES, Runtime, StopSignal, hold_folder, leave, run_main, start
from tunelib.parallel.tensor import check_split
from tunelib.parallel.watchdog import Watchdog
from tunelib.schedule import lr_factor

SAVE_REQUEST = "SAVE"
"""A file that asks for a checkpoint after the next step, when somebody puts it into the run folder."""


def main(argv: list[str]) -> None:
    world_size = int(os.environ.get("WORLD_SIZE", "1"))
    loaded = load_or_exit(argv, world_size=world_size, speak=os.environ.get("RANK", "0") == "0")
    config, folder = loaded.config, resolve_dump_folder(loaded.config)

    # Wake: device, process group, seeds. One writer holds the run folder.
    with start(config.training, config.comm) as runtime, hold_folder(folder, runtime), contextlib.ExitStack() as closing:
        console = Console(active=runtime.is_main)
        started = time.monotonic()
        stop, save_request = closing.enter_context(StopSignal()), folder / SAVE_REQUEST
        watchdog = closing.enter_context(Watchdog(config.comm, folder, runtime))
        profiler = closing.enter_context(Profiler(config.profiling, folder, runtime, console.say))

        # Arrange the machines.
        layout = build_layout(config.parallelism, runtime)
        # What adapters leave out of their inputs differs from rank to rank, but where ranks split the same products.
        torch.manual_seed((config.training.seed + runtime.rank // config.parallelism.tensor_parallel_degree) % 2**63)
        share = Share(layout.data_rank, layout.num_data_ranks, resolve_local_batch_size(config.training, config.parallelism, runtime.world_size))

        with agreed():
            # Words. Without a tokenizer of its own a model is given the one beside its weights; conversations need a chat template.
            check_sinks(config.metrics, runtime.is_main)
            check_weights_path(config.checkpoint.initial_load_path)
            tokenizer_folder = find_tokenizer_folder(config.model.tokenizer_path, config.checkpoint.initial_load_path)
            words = None
            if tokenizer_folder and (config.model.resize_embeddings or not config.checkpoint.create_seed_checkpoint):
                words = find_words(config.dataset, tokenizer_folder, config.model.resize_embeddings)
            tokenizer = words.tokenizer if words else Tokenizer(tokenizer_folder) if tokenizer_folder else None

            # Know the model: from the folder it is loaded from, or from [model].
            vocab_size = tokenizer.vocab_size if tokenizer else 0
            weights = find_weights(config.model, config.checkpoint.initial_load_path, vocab_size, config.training.seq_len)
            model = build_on_meta(weights.config, runtime.param_dtype)
            check_weights(weights)
            check_split(weights.config, config.lora, config.parallelism.tensor_parallel_degree)
            if config.lora.enable:
                add_adapters(model, config.lora)
            stages = plan_stages(model, config.parallelism, config.training.seq_len)
            trained = trained_shapes(model)

            # Data: every document's tokens, and the order, but no batch yet.
            train_data = held_out = exam = None
            data_lines, prompts = list[str](), list[list[int]]()
            if not config.checkpoint.create_seed_checkpoint:
                assert words is not None, "checked in config/check.py"
                training, section, rows_of_model = config.training, config.validation, weights.config.vocab_size
                held_out_where = HeldOut(section.path, section.split, section.fraction)
                documents = build_documents(words, config.dataset, training.seq_len, rows_of_model, held_out_where, console.say)
                batches = Batches(training.seq_len, training.global_batch_size, training.seed, share)
                train_data = build_train_data(words, config.dataset, documents.train, rows_of_model, batches, Ranks(agree, layout.gather_shares))
                data_lines = [describe_documents(train_data)] if isinstance(train_data, TrainData) else []
                data_lines += [*documents.notes, *words.notes, *train_data.notes]
                if documents.held_out is not None:
                    held_out = HeldOutData(documents.held_out, training.seq_len, config.dataset.packing, share)
                prompts = encode_prompts(section.prompts, words.tokenizer, words.template)
                exam = open_exam(section, words.tokenizer, words.template, weights.config.max_position_embeddings, share.rows * training.seq_len)

            # How the weights will leave: in the form they came in, with the words that were trained on.
            own_template = words.template.source if words and words.template and config.dataset.chat_template else None
            stop_ids = words.stop_ids if words else frozenset()
            export_dtype = DTYPES.get(config.checkpoint.export_dtype)
            export = plan_export_of(model, weights, tokenizer, own_template, stop_ids, export_dtype, config.checkpoint.export_format)

        # Memory of the run: what to go on from, if nothing that decides the run has changed since.
        checkpoint_folder = folder / config.checkpoint.folder
        model_json = json.dumps(export.fields, indent=2)
        manager = CheckpointManager(config.checkpoint, checkpoint_folder, runtime.is_main, resolved_toml(loaded), model_json, console.say)
        num_steps = config.training.steps or (train_data.steps_in_epochs(config.training.epochs or 1) if isinstance(train_data, TrainData) else 0)
        if isinstance(train_data, TrainData):
            train_data.last_step = num_steps
        decision = manager.decide(num_steps)
        console.say(decision.sentence)
        order = {**train_data.fingerprint, "validation.fraction": config.validation.fraction} if train_data else {}
        others = {"optimizer.name": config.optimizer.name, "training.dtype": config.training.dtype}
        origin, identity = describe_identity(export.fields, config.checkpoint.initial_load_path, config.lora, order | others)
        check_same(identity, "the model or data")
        with agreed():
            adapter = adapter_tensors = None
            if decision.kind == "seed" and config.lora.enable:
                raise CheckpointError(
                    f"{decision.folder} holds whole weights: adapters start from it with --checkpoint.initial_load_path, in another folder"
                )
            compiled_before = decision.resumed.compiled if decision.resumed is not None else None
            full_rows, rank = [config.training.seq_len] * config.training.global_batch_size, config.lora.rank if config.lora.enable else 0
            flops = num_steps * step_flops(weights.config, full_rows, sum(full_rows), rank) / runtime.world_size
            check_compiled_step(config.optimizer, runtime.device)
            compiled = choose_compile(config.compile.enable, find_what_rules_out_compile(config)[0], runtime.device, compiled_before, flops)
            if decision.state is not None:
                check_identity(decision.state.identity, origin if decision.kind == "seed" else identity)
            elif config.lora.adapter_path:
                adapter = open_adapter(Path(config.lora.adapter_path))
                adapter_tensors = check_adapter(adapter, config.lora, weights.config, trained)
            if runtime.is_main:
                check_own_config(folder / "config.toml")

        # Spread the model, which has been on paper so far: split, cut, recompute, FSDP2, then empty storage where each shard belongs.
        spread_model(model, config.parallelism, config.activation_checkpoint, layout, runtime, stages, compiled.compiled)

        # Give weights, unless a full checkpoint will: drawn, or any format straight into the shards. Frozen ones are in no checkpoint.
        base = ""
        if decision.kind in ("seed", "finished"):
            manager.load(model_tensors(model), decision)
        elif decision.kind == "fresh" or config.lora.enable:
            base = fill(model, weights, config.training.seed, adapter_tensors, runtime.compute_dtype)
            if decision.state is not None:
                check_base(decision.state.base, base, f"the checkpoint {decision.folder}")
            elif adapter is not None and adapter.base:
                check_base(adapter.base, base, f"lora.adapter_path {adapter.folder}")
        manager.follow(decision)
        if config.checkpoint.create_seed_checkpoint:
            saved = manager.save(model_tensors(model), RunState(0, 0, runtime.world_size, runtime.device.type, origin), kind="seed")
            console.say(f"seed checkpoint written to {saved}; start from it with the same command without create_seed_checkpoint, on any layout")
            return
        assert train_data is not None  # it is left out for a seed only
        assert words is not None

        # Optimizer; the schedule is a function of the step.
        optimizer = build_optimizer(model, config.optimizer)

        # Resume: weights, optimizer, random state; the data's place follows from the step.
        begun = RunState(0, 0, runtime.world_size, runtime.device.type, identity, None, base, compiled.compiled, dict(layout.degrees))
        if decision.state is not None:
            begun = decision.state.continued_by(begun)
        progress = Progress(model, optimizer, train_data, config.training, layout, runtime, begun)
        if decision.resumed is not None and not progress.restore(manager, decision) and config.lora.dropout:
            console.say("lora.dropout leaves out other inputs than the run would have that was saved: it had another layout")
        first_step = progress.step + 1
        if first_step > num_steps:
            how = f"extend it with more --training.steps or --training.epochs (now {num_steps} steps)"
            console.say(f"this run is finished at step {progress.step}; {how}")

        # Watch: the opening lines, metrics, samples and the first validation. From here on, a signal waits for the step in hand.
        stop.wait_for_steps()
        is_unvalidated = held_out is not None and decision.resumed is not None and progress.validation_loss is None
        was_cut = is_unvalidated and (progress.step % config.validation.freq == 0 or progress.step == num_steps)  # by the signal that ended the run
        with agreed(f"{folder} cannot be written"):
            if runtime.is_main:
                replace_file(folder / "config.toml", resolved_toml(loaded))
            resumed_step = progress.step if decision.kind in ("resume", "finished") else None
            metrics = closing.enter_context(open_metrics(folder, config.metrics, resumed_step, was_cut, runtime.is_main, console.say))
            samples = closing.enter_context(RowWriter(folder / SAMPLES_FILE, resumed_step, runtime.is_main, console.say, was_cut))
        since = decision.folder if resumed_step is not None and runtime.is_main else None
        if since is not None and (changed := describe_changes(since / "config.toml", folder / "config.toml")):
            console.say(f"changed since then: {changed}")
        origin_of_weights = weights.sentence if decision.kind == "fresh" or config.lora.enable else "weights from the checkpoint"
        num_parameters = sum(shape.numel() for shape in expected_shapes(model.config).values())
        for line in opening_lines(
            config, runtime, layout, compiled, stages, trained, num_parameters, data_lines, num_steps, origin_of_weights, export.notes
        ):
            console.say(line)
        summary = Summary(config, model.config, what_is_trained(config, num_parameters, trained, num_steps, origin_of_weights))

        def validate() -> None:
            with watchdog.watch("a validation"), mark("validation"):
                loss = evaluate(model, held_out, runtime, layout, stop) if held_out is not None else None
                scores = exam.score(model, build_crew(layout, runtime.device, stop, watchdog.renew)) if exam is not None and loss is not None else {}
            if held_out is not None and loss is not None and scores is not None:
                progress.validated(loss)
                metrics.write({"step": progress.step, "validation_loss": loss, "tokens": progress.tokens_seen})
                summary.add_validation(loss)
                console.say(f"step {progress.step}: validation loss {loss:.4f} on {held_out.num_trained:,} held-out tokens")
                if scores:
                    metrics.write({"step": progress.step, **scores, "tokens": progress.tokens_seen})
                    console.say(f"step {progress.step}: {describe_scores(scores)}")

        def show_samples() -> None:
            answers = answer_prompts(model, prompts, words.tokenizer, stop_ids, config.validation.max_new_tokens, runtime.device)
            for prompt, answer in zip(config.validation.prompts, answers, strict=True):
                samples.write({"step": progress.step, "prompt": prompt, "answer": answer})
                console.say(f"step {progress.step}: {prompt!r} → {answer!r}")

        def capture() -> tuple[dict[str, torch.Tensor], RunState]:
            """What is to be saved, once the disk has the rows that stand for it."""
            metrics.sync()
            samples.sync()
            return progress.capture()

        def save() -> None:
            with watchdog.watch("a save"), mark("saving"):
                manager.save_and_go_on(*capture())

        def raise_stopped() -> NoReturn:
            with watchdog.watch("the last save"):
                done = manager.save_in_time(*capture(), lambda: stop.seconds_since)
            raise Stopped(f"stopped after step {progress.step} by a signal, {done}")

        def pass_over(loss: float, grad_norm: float) -> None:
            """A step whose numbers are not finite: written down, and then what on_nonfinite says."""
            at_fault, before = progress.step + 1, progress.passed_over
            documents = train_data.documents_of(at_fault) if isinstance(train_data, TrainData) else None
            with RowWriter(folder / NONFINITE_FILE, max(at_fault, *before) if before else None, runtime.is_main, console.say) as rows:
                rows.write({"step": at_fault, "loss": repr(loss), "grad_norm": repr(grad_norm), "documents": documents})
            console.say(progress.pass_over(loss, grad_norm, manager, num_steps))
            metrics.cut(progress.step)
            samples.cut(progress.step)

        if progress.step == 0 or was_cut:
            validate()
        if progress.step == 0:
            show_samples()

        # The loop, which ends early, saved, where a signal asks for it.
        console.start_steps(num_steps, progress.step)
        while progress.step < num_steps and not progress.has_lost_patience(config.validation.patience):
            is_stopped, is_asked = any_rank((stop.received, runtime.is_main and save_request.is_file()), runtime.device)
            if is_stopped:
                break
            if is_asked and progress.step > 0:
                console.say(f"step {progress.step}: saving, since {save_request} asks for it")
                save()
                if runtime.is_main:
                    save_request.unlink(missing_ok=True)
            step_began = time.monotonic()
            step = progress.step + 1
            profiler.begin(step)
            with mark("data"):
                work = train_data.step(step)
            lr = config.optimizer.lr * lr_factor(config.lr_scheduler, step, num_steps)
            row: dict[str, Any] = {"step": step, "epoch": work.epoch, "lr": lr}
            if step not in progress.passed_over:
                with watchdog.step(step, is_first=not summary.has_steps):
                    loss, grad_norm = train_step(model, optimizer, work, lr, config.training.max_norm, runtime, layout)
                if not (math.isfinite(loss) and math.isfinite(grad_norm)):
                    pass_over(loss, grad_norm)
                    if config.training.on_nonfinite == "rollback":
                        continue  # from where it has gone back to; a stream gives the rows of this very step again, too
            is_passed_over = step in progress.passed_over
            progress.advance(0 if is_passed_over else work.num_tokens)
            if is_passed_over:
                metrics.write(row | {"passed_over": True, "tokens": progress.tokens_seen})
            else:
                summary.add_step(work, time.monotonic() - step_began, loss)
            if isinstance(train_data, StreamData) and step in (first_step, num_steps):
                console.say("\n".join(train_data.report))
            if not is_passed_over and (step % config.metrics.log_freq == 0 or step == num_steps):
                row |= {"loss": loss, "grad_norm": grad_norm, "tokens": progress.tokens_seen} | summary.speed()
                row["memory_gib"] = largest_of_ranks(peak_memory_gib(runtime.device), runtime.device)
                metrics.write(row)
                console.step(row)
            if config.validation.enable and step % config.validation.freq == 0:
                validate()
            if step < num_steps and manager.is_due(step, (train_data.epochs_after(step - 1), train_data.epochs_after(step)), progress.is_best):
                save()
            profiler.end()
        console.end_steps()
        step, early_end = progress.step, progress.describe_early_end(config.validation.patience)
        console.say(early_end)
        if step < num_steps and not early_end:
            if not config.checkpoint.enable_checkpoint:
                raise TunelibError(f"stopped after step {step} by a signal; nothing was saved: checkpoint.enable_checkpoint is false")
            if step == 0:
                raise Stopped("stopped by a signal before the first step; the same command begins again")
            raise_stopped()

        # Close: the last validation and samples, the last checkpoint, the export, one summary.
        if step >= first_step or was_cut:
            if progress.validation_loss is None:
                validate()
            if progress.validation_loss is None and held_out is not None and config.checkpoint.enable_checkpoint:
                raise_stopped()
            show_samples()
        checkpoint = None
        if config.checkpoint.enable_checkpoint:
            (tensors, state), is_alone = capture(), config.checkpoint.model_weights_only
            if is_alone:
                tensors = {name: tensor.to(export.dtypes[name]) for name, tensor in model_tensors(model).items()}
            with watchdog.watch("the last save"):
                checkpoint = manager.save(tensors, state, kind="model" if is_alone else "full")
        console.say(progress.load_best(manager))
        progress.check_finite()
        adapter_line = export_line = ""
        if config.lora.enable:
            origin_path = config.checkpoint.initial_load_path
            adapter_line = export_adapter(model, config.lora, origin_path, base, own_template, folder / "adapter", runtime.is_main)
        if config.lora.save_adapter_weights_only:
            adapter_line += "; export/ beside it is of an earlier end of this run" if (folder / "export").exists() else ""
        else:
            check = config.checkpoint.verify_export
            with watchdog.watch("the export"):
                proof = export_model(export, model, folder / "export", runtime.is_main, tokenizer, check, sharded=layout.mesh is not None)
            export_line = describe_export(export, proof)
        if progress.passed_over:
            console.say(f"{len(progress.passed_over)} of {step} steps were passed over: {', '.join(map(str, progress.passed_over))}")
        outputs = Outputs(folder, checkpoint, export_line, adapter_line, progress.exported, can_go_on=not early_end)
        summary.end(step, progress.tokens_seen, time.monotonic() - started, outputs, runtime, console.say)


def train_step(
    model: Decoder, optimizer: torch.optim.Optimizer, work: Step, lr: float, max_norm: float, runtime: Runtime, layout: Layout
) -> tuple[float, float]:
    """One optimizer step over all micro-batches of this rank.

    Returns:
        The loss in nats per trained token of the whole global batch, and the gradient norm before clipping; the same on every rank. Where one
        of them is not finite, nothing has changed.
    """
    total = torch.zeros((), dtype=torch.float64, device=runtime.device)
    if isinstance(model.pipeline, Pipeline):
        with mark("forward and backward"):
            total += model.pipeline.train(work.batches, work.num_trained)  # the same in the order of a schedule
    else:
        for batch in work.batches:
            batch = batch.to(runtime.device)
            with mark("forward"):
                summed = model(batch.tokens, batch.positions, batch.document_lengths, labels=batch.labels)
            # The step's trained tokens are known beforehand, over all ranks and micro-batches: sums of gradients need no more scaling.
            with mark("backward"):
                (summed / work.num_trained).backward()
            total += summed.detach()
    grad_norm = clip_gradients(model.parameters(), max_norm, layout.pipeline).item()
    loss = sum_over_ranks(total, layout.sums).item() / work.num_trained
    if math.isfinite(loss) and math.isfinite(grad_norm):
        with mark("optimizer"):
            set_lr(optimizer, lr)
            optimizer.step()
    optimizer.zero_grad()
    return loss, grad_norm


def evaluate(model: Decoder, data: HeldOutData, runtime: Runtime, layout: Layout, stop: StopSignal) -> float | None:
    """The loss in nats per trained token over all held-out documents; None where a signal ends it. Every rank must call it."""
    total = torch.zeros((), dtype=torch.float64, device=runtime.device)
    with forward_only(model):
        for batch in data.batches():
            if any_rank((stop.received,), runtime.device)[0]:
                return None
            batch = batch.to(runtime.device)
            total += model(batch.tokens, batch.positions, batch.document_lengths, labels=batch.labels)
    return sum_over_ranks(total, layout.sums).item() / data.num_trained


if __name__ == "__main__":
    leave(run_main(main, sys.argv[1:]))
