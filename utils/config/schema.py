"""The config's keys as data: name, type, default, range and a line of explanation each.

The checker reads these tables, and so does the reference in docs (`python -m tools.keys` prints it).
Arguments of models, losses, loaders, optimizers and schedules aren't here: their constructors say what they take.
"""
from __future__ import annotations

from collections.abc import Mapping
from copy import copy
from dataclasses import dataclass, field
from typing import Any

from utils.class_counts import FEW, MANY

#: The default of a key that must be given.
REQUIRED = ...


@dataclass(frozen=True)
class Row:
    """One key. `type` is an annotation (see utils.config.annotation); numbers lie in [low, high], or above `above`."""

    name: str
    type: str
    default: Any
    doc: str
    low: float | None = None
    high: float | None = None
    above: float | None = None


@dataclass(frozen=True)
class Section:
    """A `{"type", "args"}` part of the config: where its classes are, and which arguments the program passes itself."""

    what: str
    #: Modules whose public classes it may name, or "module:TABLE"; imported only when a config is checked.
    tables: tuple[str, ...]
    #: "module:Class" that every type must derive from, a user's own too; functions are exempt.
    base: str = "builtins:object"
    skip: tuple[str, ...] = ()
    #: How many arguments the program passes by position, and those it passes by name where the class takes them.
    placed: int = 0
    provided: tuple[str, ...] = ()
    #: Arguments that a config may not set, as the program passes them: name -> what sets it instead.
    reserved: Mapping[str, str] = field(default_factory=dict)
    #: Arguments of old configs that no longer have an effect: type ("" for all) -> name -> its annotation.
    dropped: Mapping[str, Mapping[str, str]] = field(default_factory=dict)
    #: Types that exist but can't work here: name -> why.
    refused: Mapping[str, str] = field(default_factory=dict)
    #: What an absent section stands for; `...` where it is required.
    default: Any = ...


TOP = (
    Row("name", "str", "run", "the run's name, and its folder's"),
    Row("n_gpu", "int", 1, "processes to train with, one a GPU; fewer where the machine has fewer", low=0),
    Row("seed", "int", 0, "seed of weights, data order, augmentation and dropout", low=0, high=2**32 - 1),
    Row("metrics", "list[str]", ["accuracy"],
        "figures of each epoch and of the test: accuracy, top_k_acc; of the whole split: auc, ece, macro_f1; your own"),
    Row("add_extra_info", "bool", False, "of old configs; the losses always get what they need"),
    Row("distill", "bool", False, "learn from a teacher too: needs distill_arch and distill_checkpoint"),
    Row("distill_checkpoint", "str | None", None, "the teacher's weights"),
    Row("pretrained", "str | None", None, "weights to start from; a classifier of other classes is left new"),
    Row("fallback", "str | None", None, "the config to train with where the network's own weights can't be had"),
    Row("load_crt", "str | None", None, "stage 1's checkpoint: load all but the classifier, freeze the rest"),
    Row("init_classifier", "str | dict | None", None,
        "what a new run's classifier starts from: class_means (of the training images), or text (the class names)"),
    Row("second_stage", "bool", False, "the config is for use with load_crt only: training without it is refused"),
    Row("resume_state_dict_only", "bool", False, "with -r and -c: start a new run from the checkpoint's weights"),
)

GROUPS = (
    Row("many", "int", MANY, "a class with more training images is many-shot", low=0),
    Row("few", "int", FEW, "a class with fewer is few-shot; those between are medium-shot", low=0),
)

TRAINER = (
    Row("type", "str | None", None, "inferred where absent, from the arch and `distill`"),
    Row("epochs", "int", REQUIRED, "passes over the training images", low=1),
    Row("save_dir", "str", "saved/", "where runs go: <save_dir>/models/<name>/<run_id>"),
    Row("save_period", "int", 10, "write a checkpoint every so many epochs; the last is always written", low=1),
    Row("keep_last", "int | None", None, "keep only the newest so many epoch checkpoints; null keeps all", low=1),
    Row("verbosity", "int", 2, "0 warnings, 1 a line an epoch, 2 also lines of steps", low=0, high=2),
    Row("monitor", "str", "off", "\"off\", or what makes an epoch the best: \"max val_macro_f1\", \"min val_loss\""),
    Row("early_stop", "int | None", None, "stop after so many epochs without a better one; null or 0 never", low=0),
    Row("tensorboard", "bool", True, "write TensorBoard events"),
    Row("log_step", "int | None", None, "steps between two readings and lines; null chooses, lines 5 s apart", low=1),
    Row("progress", "bool", True, "a progress bar where there is a terminal"),
    Row("amp", "Literal['off', 'auto', 'bf16', 'fp16', False]", "off",
        "mixed precision; auto: bf16 where the hardware has it; fp16 brings a loss scaler"),
    Row("accumulate", "int", 1, "batches that make one optimizer step, as one batch of all their images would", low=1),
    Row("ema", "dict | None", None,
        "{\"decay\": 0.999, \"warmup\": true, \"every\": 1}: average the weights; the average is tested and saved"),
    Row("swa", "dict | None", None, "{\"epochs\": 5}: also write the mean of the last epochs' weights, model_swa.pth"),
    Row("hooks", "list[dict]", [], "more of what happens around steps: [{\"type\": \"module:Class\", \"args\": {}}]"),
    Row("clip_grad_norm", "float | None", None, "largest norm of all gradients together; null doesn't clip", above=0),
    Row("channels_last", "bool", True, "NHWC memory: faster convolutions"),
    Row("compile", "Literal[False, True, 'norms', 'layers', 'auto']", False,
        "torch.compile the model; norms: on a CPU its norms and what follows them, in C++, by this machine's compiler; "
        "layers: those and its 3x3 convolutions; auto: what of these was measured to be faster"),
    Row("deterministic", "bool", True, "the same seed gives the same run on a GPU too, a detector's nearly; false: "
        "faster attention, and cuDNN searches for its fastest algorithms"),
    Row("on_nonfinite", "Literal['stop', 'skip']", "stop", "what a loss or gradient that isn't finite does"),
    Row("max_skipped", "int", 100, "with on_nonfinite skip: give up after so many skipped steps", low=1),
    Row("no_decay", "Literal['norm_bias'] | None", None,
        "norm_bias: no weight decay on one-dimensional parameters (norms, biases, scales)"),
    Row("layer_decay", "float | None", None,
        "the rate is multiplied by it once for each stage between a parameter and the classifier", above=0, high=1),
    Row("freeze", "str | float | list[str] | dict | None", None,
        "what isn't trained: backbone (all but classifier and gates), norms, beginnings of parameters' names, or a "
        "share of the stages from the stem on (0.5); {\"until\": \"epoch 3\", \"what\": \"backbone\", \"then\": 0.5}: "
        "the backbone in epochs 1 to 3, the first half of its stages from epoch 4 on"),
    Row("cache_features", "bool | dict | None", None, "true: features under a frozen classifier are computed once, "
        "unaugmented; {\"views\": 4}: of so many augmented views of each image, which epochs take in turn"),
    Row("no_decay_scale", "bool", False, "no weight decay on NBN's learned scales"),
    Row("classifier_lr", "float | None", None, "a base rate of the classifier's own (Places-LT)", above=0),
    Row("bt_gather", "bool", False, "BatchFormer attends over all processes' features"),
    Row("log_batch_attention", "bool", False, "BatchFormer's attention, class by class, to TensorBoard"),
    Row("record_statistics", "bool", False, "one norm layer's forward and backward statistics, to TensorBoard"),
    Row("statistics_layer", "str | None", None, "that layer's name; null takes the last norm layer"),
    Row("image_grid", "bool", True, "input images to TensorBoard, once; of a detector, each epoch, what it finds too"),
    Row("report", "bool", False, "write the run's report.html at the end, as `python -m tools.report` does"),
    Row("figures", "bool", True, "the report's figures of the test split, to TensorBoard, at the end (about 3 s)"),
    Row("histograms", "bool | int | None", None,
        "weight histograms to TensorBoard every so many epochs; null: ten times a run; false: never", low=0),
    Row("profile", "bool", False, "write a torch.profiler trace of a few steps"),
    Row("iterations", "int | None", None, "detection: so many steps, if `epochs` don't end before", low=1),
)

SECTIONS = {
    "arch": Section("model", ("model.model:ARCHS", "model.model:ELSEWHERE"), "base.base_model:BaseModel",
                    provided=("num_classes",)),
    "distill_arch": Section("model", ("model.model:ARCHS", "model.model:ELSEWHERE"), "base.base_model:BaseModel",
                            provided=("num_classes",), default=None),
    "data_loader": Section(
        "data loader", ("data_loader.data_loaders",), "base.base_data_loader:BaseDataLoader",
        provided=("seed", "device", "rank", "world_size", "epochs", "facts", "preprocess"),
        reserved={"seed": "the top-level key seed", "device": "the flag -d", "rank": "torchrun",
                  "world_size": "torchrun", "epochs": "trainer.epochs", "facts": "the checkpoint",
                  "preprocess": "arch.args.model_name"},
        dropped={"": {"distributed": "bool"}}),
    "optimizer": Section("optimizer", ("trainer.schedules:OPTIMIZERS", "torch.optim"), "torch.optim:Optimizer",
                         skip=("Optimizer",), placed=1,
                         refused={"LBFGS": "it evaluates the loss several times a step, which training doesn't",
                                  "SparseAdam": "it takes sparse gradients only, and these models have none"}),
    "loss": Section("loss", ("model.loss:LOSSES",), "torch.nn:Module", provided=("cls_num_list", "epochs"),
                    default={"type": "CrossEntropyLoss", "args": {}}),
    "lr_scheduler": Section("schedule", ("trainer.rates:SCHEDULES", "torch.optim.lr_scheduler"),
                            "torch.optim.lr_scheduler:LRScheduler", skip=("LRScheduler",),
                            provided=("optimizer", "max_lr", "epochs", "steps_per_epoch"),
                            reserved={"last_epoch": "-r, which resumes the schedule", "run_epochs": "trainer.epochs",
                                      "unit": "args.by"},
                            dropped={kind: {"step1": "int", "step2": "int", "gamma": "float"}
                                     for kind in ("CosLR", "LinearLR0")}, default={}),
}
_IN_ARCH = {
    "classifier": Section("classifier", ("model.classifier:HEADS",), "torch.nn:Module", placed=3),
    "norm": Section("norm", ("model.norm.convert:NORMS",), "torch.nn:Module", placed=1,
                    reserved={"affine": "the norm it takes the place of"}),
    "tuning": Section("tuning", ("model.tuning:TUNINGS",), placed=2),
}
#: Names and specs inside a section's arguments: section -> argument -> what it is.
NESTED = {
    "arch": _IN_ARCH, "distill_arch": _IN_ARCH,
    "data_loader": {"sampler": Section(
        "sampler", ("data_loader.samplers:SAMPLERS",), "data_loader.samplers:EpochSampler", provided=("epochs",),
        reserved={"targets": "the data", "seed": "the top-level key seed", "rank": "torchrun",
                  "world_size": "torchrun"})},
    "optimizer": {"base": SECTIONS["optimizer"], "others": SECTIONS["optimizer"]},
}
#: What `init_classifier` names.
STARTS = Section("start", ("trainer.head_start:STARTS",), placed=3)
#: What `trainer.hooks` lists.
HOOKS = Section("hook", ("trainer.hooks:HOOKS",), "trainer.hooks.base:Hook", placed=1)
#: `trainer.type` -> its class.
TRAINERS = Section("trainer", ("trainer:TRAINERS",), "base.base_trainer:BaseTrainer")
#: Modules of the functions that `metrics` may name.
METRICS = ("model.metric", "model.split_metrics")
#: Figures of a whole split that every validation computes; `metrics` may name them too.
COUNTED = ("class_mean_acc", "many_shot_acc", "medium_shot_acc", "few_shot_acc", "macro_f1", "ece")

#: Detection's figures, which can be monitored.
DETECTED = tuple(f"{kind}_{name}" for kind in ("bbox", "segm") for name in (
    "AP", "AP50", "AP75", "APs", "APm", "APl", "AP_many", "AP_medium", "AP_few"))

#: `Section.what` -> ranges of arguments that hold for every class of it. Constructors check the rest.
LIMITS = {
    "model": {"num_experts": {"low": 1}, "num_classes": {"low": 1}, "top_choices_num": {"low": 1},
              "pos_weight": {"above": 0}, "layer2_output_dim": {"low": 1}, "layer3_output_dim": {"low": 1},
              "layer4_output_dim": {"low": 1}},
    "data loader": {"batch_size": {"low": 1}, "num_workers": {"low": 0}, "image_size": {"low": 1}},
    "optimizer": {"lr": {"above": 0}, "weight_decay": {"low": 0}},
    "schedule": {**{key: {"low": 0} for key in ("step1", "step2", "warmup_epoch", "warmup_start", "base_lr", "gamma")},
                 **{key: {"low": 1} for key in ("T_max", "T_0", "T_mult", "step_size", "step_size_up",
                                                "step_size_down", "total_iters")},
                 **{key: {"above": 0} for key in ("max_lr", "div_factor", "final_div_factor")}},
    "norm": {"eps": {"above": 0}, "momentum": {"low": 0, "high": 1}, "num_groups": {"low": 1}},
}


def defaults(rows: tuple[Row, ...], given: Mapping[str, Any]) -> dict[str, Any]:
    """`given` plus the defaults of the keys that it leaves out; required keys have none."""
    return {row.name: copy(row.default) for row in rows if row.default is not REQUIRED} | dict(given)
