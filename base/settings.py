"""Settings that a run's result doesn't depend on."""
from __future__ import annotations

#: Keys of `trainer` that change what is written or shown, or the speed, but not what is learned.
COSMETIC = ("save_dir", "save_period", "keep_last", "verbosity", "tensorboard", "log_step", "progress", "figures",
            "image_grid", "histograms", "profile", "record_statistics", "statistics_layer", "log_batch_attention",
            "compile")
#: Keys that may change in a run with no epoch left, whose record stays true: where things are, what is shown, when it
#: ends, and how it would be computed.
ANY_TIME = {"n_gpu", "metrics", "resume_state_dict_only", "add_extra_info", "second_stage", "fallback",
            *(f"data_loader.args.{key}" for key in ("data_dir", "num_workers", "cache")),
            *(f"trainer.{key}" for key in (
                *COSMETIC, "monitor", "type", "epochs", "iterations", "early_stop", "report", "amp", "channels_last",
                "deterministic", "on_nonfinite", "max_skipped"))}
