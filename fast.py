"""The same computation, faster: many seeds as one batch, and CUDA graphs.

  Stack      K modules of one kind as one, whose weights have a leading seed dimension
  each       a function written for one seed, computed for all seeds of its Stacks at once
  CudaGraph  a function whose GPU kernels are recorded once and then launched all together

The networks of LOGO are small: a GPU would spend its time on being told what to do next, not on
doing it. A batch of five seeds tells it no more often than one seed does, and a recorded graph is
told in one go (what that gains is not measured: README, Speed). No formula knows of either:
logo_wm.py, macql.py and buffer.py are written for one seed.
"""

from collections.abc import Callable

import torch
import torch.nn as nn
from torch.func import functional_call
from torch.utils._pytree import tree_flatten, tree_map, tree_unflatten


class _Call(nn.Module):
    """Lets `functional_call` put other weights into a module while any function uses it."""

    def __init__(self, module: nn.Module):
        super().__init__()
        self.module = module

    def forward(self, function: Callable):
        return function(self.module)


class Stack(nn.Module):
    """K modules that differ in their weights alone, as one; for `each` and for an optimizer.

    The modules stay usable by themselves: their parameters and buffers become slices of the
    stacked ones, so whatever is learnt here, is learnt there (and loaded there, is loaded here).

    Args:
        modules: K of them, of one class and one shape, on one device.
    """

    def __init__(self, modules: list[nn.Module]):
        super().__init__()
        self._call = (_Call(modules[0]),)  # in a tuple: its weights are not this module's
        self.names, tensors = [], []
        everything = [dict(m.named_parameters()) | dict(m.named_buffers()) for m in modules]
        for name, first in everything[0].items():
            whole = torch.stack([tensors_of[name].detach() for tensors_of in everything])
            for k, tensors_of in enumerate(everything):
                tensors_of[name].data = whole[k]
            self.names.append("module." + name)
            tensors.append(nn.Parameter(whole, requires_grad=first.requires_grad))
        self.stacked = nn.ParameterList(tensors)

    def parameters(self, recurse: bool = True):
        """Those that learn, in the order of the modules' own."""
        return (p for p in super().parameters(recurse) if p.requires_grad)

    def tensors(self) -> dict[str, torch.Tensor]:
        return dict(zip(self.names, self.stacked, strict=True))

    def use(self, tensors: dict[str, torch.Tensor], function: Callable):
        """function(module) with these weights of one seed in the module."""
        return functional_call(self._call[0], tensors, (function,))


def each(function: Callable, *args, **settings):
    """function(*args, **settings) of every seed at once, as one batched computation.

    Args:
        function: of one seed; may not draw random numbers nor look at values.
        args: a Stack stands for a seed's module, a tensor of shape (K,...) for a seed's tensor
            (also within tuples and dicts); anything else is the same for all. Where no argument
            is a Stack there is one seed: the function is called as it is.
        settings: the same for all seeds.
    Returns:
        what the function returns, tensors (or None), each with a leading dimension K.
    """
    stacks = {i: a for i, a in enumerate(args) if isinstance(a, Stack)}
    if not stacks:
        return function(*args, **settings)
    inputs = [stacks[i].tensors() if i in stacks else a for i, a in enumerate(args)]
    dims = tree_map(lambda x: 0 if isinstance(x, torch.Tensor) else None, inputs)
    form = []  # of the result: its tree, and which leaves are None, which vmap cannot return

    def one(*inputs):
        def fill(i: int, filled: tuple):  # put the weights of one Stack after the other in place
            if i == len(inputs):
                return function(*filled, **settings)
            if i not in stacks:
                return fill(i + 1, (*filled, inputs[i]))
            return stacks[i].use(inputs[i], lambda module: fill(i + 1, (*filled, module)))

        leaves, tree = tree_flatten(fill(0, ()))
        form[:] = tree, [leaf is not None for leaf in leaves]
        return [leaf for leaf in leaves if leaf is not None]

    tensors = iter(torch.vmap(one, in_dims=tuple(dims))(*inputs))
    tree, filled = form
    return tree_unflatten([next(tensors) if f else None for f in filled], tree)


class CudaGraph:
    """A function of tensors, recorded on the GPU once and replayed at every later call.

    What the function changes in place (weights, optimizer state) is changed by every replay.

    Args:
        function: (*tensors or None) -> dict of tensors; always the same shapes, no look at a value,
            no random numbers, no state outside of tensors.
        warm_up: calls that run as they are before the recording; they count like any other.
    Returns of a call: the function's result, overwritten by the next call.
    """

    def __init__(self, function: Callable, warm_up: int = 3):
        self.function, self.warm_up, self.graph = function, warm_up, None
        self.stream = torch.cuda.Stream()

    def __call__(self, *inputs):
        if self.warm_up > 0:  # on a stream of its own, as recording demands
            self.warm_up -= 1
            self.stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(self.stream):
                result = self.function(*inputs)
            torch.cuda.current_stream().wait_stream(self.stream)
            return result
        given = [x for x in inputs if x is not None]
        if self.graph is None:
            held = [None if x is None else x.clone() for x in inputs]
            self.held = [x for x in held if x is not None]
            self.graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self.graph):
                self.result = self.function(*held)
        torch._foreach_copy_(self.held, given)
        self.graph.replay()
        return self.result
