"""On PYTHONPATH, it makes torch look like pip's usual build for Linux: made for CUDA, on a machine without a GPU."""

import importlib.abc
import importlib.machinery
import sys


class CudaVersion(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path, target=None):
        if name != "torch.version":
            return None
        sys.meta_path.remove(self)
        spec = importlib.machinery.PathFinder.find_spec(name, path)
        execute = spec.loader.exec_module

        def exec_module(module):
            execute(module)
            module.cuda = "13.0"

        spec.loader.exec_module = exec_module
        return spec


sys.meta_path.insert(0, CudaVersion())
