"""Keys of other eras and of other days: what they are called now, what replaced them, and what is not built yet.

On the command line an old spelling works, with one notice. In a file it is an error that gives today's line, since a file stays.
"""

RENAMED = {
    # torchtitan v0.1 and before: the degrees
    "training.data_parallel_degree": "parallelism.data_parallel_shard_degree",
    "training.data_parallel_replicate_degree": "parallelism.data_parallel_replicate_degree",
    "training.data_parallel_shard_degree": "parallelism.data_parallel_shard_degree",
    "training.tensor_parallel_degree": "parallelism.tensor_parallel_degree",
    "training.pipeline_parallel_degree": "parallelism.pipeline_parallel_degree",
    "training.context_parallel_degree": "parallelism.context_parallel_degree",
    "training.compile": "compile.enable",
    "experimental.enable_async_tensor_parallel": "parallelism.enable_async_tensor_parallel",
    "training.fsdp_reshard_after_forward": "parallelism.fsdp_reshard_after_forward",
    "experimental.pipeline_parallel_degree": "parallelism.pipeline_parallel_degree",
    "experimental.pipeline_parallel_schedule": "parallelism.pipeline_parallel_schedule",
    "experimental.pipeline_parallel_split_points": "parallelism.pipeline_parallel_split_points",
    "experimental.context_parallel_degree": "parallelism.context_parallel_degree",
    # torchtitan: batch, schedule, data
    "training.batch_size": "training.local_batch_size",
    "training.max_seq_len": "training.seq_len",
    "training.context_len": "training.seq_len",
    "training.dataset": "dataset.path",
    "training.dataset_path": "dataset.path",
    "training.warmup_steps": "lr_scheduler.warmup_steps",
    "lr_scheduler.lr_min": "lr_scheduler.min_lr_factor",
    "lr_scheduler.decay_steps_ratio": "lr_scheduler.decay_ratio",
    "job.seed": "training.seed",
    "debug.seed": "training.seed",
    "debug.deterministic": "training.deterministic",
    "training.init_timeout_seconds": "comm.init_timeout_seconds",
    "training.train_timeout_seconds": "comm.train_timeout_seconds",
    "experimental.init_timeout_seconds": "comm.init_timeout_seconds",
    "experimental.train_timeout_seconds": "comm.train_timeout_seconds",
    # torchtitan: checkpoints, weights, validation
    "checkpoint.enable": "checkpoint.enable_checkpoint",
    "checkpoint.last_save_model_only": "checkpoint.model_weights_only",
    "checkpoint.last_save_model_weights_only": "checkpoint.model_weights_only",
    "model.hf_assets_path": "model.tokenizer_path",
    "validation.enabled": "validation.enable",
    "validation.dataset_path": "validation.path",
    # what other trainers call it
    "optimizer.learning_rate": "optimizer.lr",
    "optimizer.min_lr_ratio": "lr_scheduler.min_lr_factor",
    "training.learning_rate": "optimizer.lr",
    "training.num_epochs": "training.epochs",
    "training.num_steps": "training.steps",
    "training.max_steps": "training.steps",
}
"""Old dotted key → today's."""

REPLACED = {
    "model.name": 'the model follows from its weights (checkpoint.initial_load_path) or from model.flavor, such as "llama3.2-1b"',
    "optimizer.fused": "AdamW is always torch's fused one",
    "optimizer.implementation": "AdamW is always torch's fused one",
    "training.gradient_accumulation_steps": "it follows from training.global_batch_size and training.local_batch_size",
    "experimental.gradient_accumulation_steps": "it follows from training.global_batch_size and training.local_batch_size",
    "parallelism.pipeline_parallel_microbatch_size": "the micro-batch is training.local_batch_size, in a pipeline too",
    "parallelism.pipeline_parallel_microbatches": "their number follows from training.global_batch_size and training.local_batch_size",
    "experimental.pipeline_parallel_microbatches": "their number follows from training.global_batch_size and training.local_batch_size",
    "checkpoint.initial_load_model_only": "checkpoint.initial_load_path loads the weights alone",
    "checkpoint.initial_load_model_weights_only": "checkpoint.initial_load_path loads the weights alone",
    "checkpoint.initial_load_in_hf": "the form of checkpoint.initial_load_path is seen from its files",
    "checkpoint.last_save_in_hf": "the weights always leave in the form they came in",
    "validation.dataset": "name a file as validation.path, or a share of dataset.path as validation.fraction",
    "validation.steps": "the whole held-out set is read each time",
    "validation.seq_len": "validation reads rows of training.seq_len",
    "validation.local_batch_size": "validation reads micro-batches of training.local_batch_size",
}
"""Keys with no counterpart, and what is done instead: an error everywhere."""

UNBUILT = {
    "quantize": "quantisation",
    "float8": "float8 training",
    "mx": "MX training",
    "checkpoint.exclude_from_loading": "loading part of a checkpoint",
    "parallelism.disable_loss_parallel": "gathering the logits of a split vocabulary",
    "parallelism.context_parallel_rotate_method": "context parallelism",
    "parallelism.expert_parallel_degree": "expert parallelism",
    "comm.trace_buf_size": "the flight recorder",
}
"""Sections and keys that will come, and the capability they belong to: an error everywhere."""
