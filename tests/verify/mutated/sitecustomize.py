"""On PYTHONPATH of every process: puts the mutant named in DISTCNN_MUTANT into a worker once the trainer is loaded."""

import importlib.abc
import importlib.util
import os
import sys


class AfterRecord(importlib.abc.MetaPathFinder):
    """Waits for distcnn.verify.record, the last of what a worker imports."""

    def find_spec(self, name, path=None, target=None):
        if name != "distcnn.verify.record":
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        load = spec.loader.exec_module

        def then_mutate(module):
            load(module)
            from distcnn.world import read_world
            from tests.verify.mutants import applied

            self.mutant = applied(os.environ["DISTCNN_MUTANT"], read_world())
            self.mutant.__enter__()

        spec.loader.exec_module = then_mutate
        return spec


if os.environ.get("DISTCNN_MUTANT"):
    sys.meta_path.insert(0, AfterRecord())
