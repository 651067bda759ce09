"""Norm layers, usable in any `nn.Module`, and functions that convert, fold and compile them."""
from model.norm.act import compile_norms, norm_relu
from model.norm.cenconv import CenConv2d
from model.norm.convert import NORMS, convert_norm, norm_args, norm_spec
from model.norm.fold import fold_norm
from model.norm.grouped import GroupedBatchNorm2d
from model.norm.mabn import MABN2d
from model.norm.nbn import NormalizedBatchNorm2d
from model.norm.plain import GroupNorm2d, InstanceNorm2d, LayerNorm2d, SyncBatchNorm
from model.norm.recorder import StatisticsRecorder
from model.norm.renorm import BatchRenorm2d

__all__ = ["NORMS", "BatchRenorm2d", "CenConv2d", "GroupNorm2d", "GroupedBatchNorm2d", "InstanceNorm2d", "LayerNorm2d",
           "MABN2d", "NormalizedBatchNorm2d", "StatisticsRecorder", "SyncBatchNorm", "compile_norms", "convert_norm",
           "fold_norm", "norm_args", "norm_relu", "norm_spec"]
