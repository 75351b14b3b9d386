"""Parameters and random numbers of flashinfer.sampling, as raddle.ops takes them."""

from numbers import Real

LEAST_TOP_P = 2.0**-126  # stands in for 0, with which the likeliest token is kept alone
_MOST_TOP_K = 2**31 - 1

# -- random numbers -----------------------------------------------------------------------------


def get_seed_and_offset(increment, generator=None, device=None):
    """(seed, offset) of a generator, which moves on by increment, rounded up to whole fours.

    generator None: torch's default one of device (None: the current GPU). A generator of the CPU
    has no offset: its next number is the seed.
    """
    import torch

    if generator is None:
        device = torch.device("cuda" if device is None else device)
        if device.type == "cpu":
            generator = torch.default_generator
        else:
            index = torch.cuda.current_device() if device.index is None else device.index
            generator = torch.cuda.default_generators[index]
    if generator.device.type == "cpu":
        return int(torch.randint(2**63 - 1, (), dtype=torch.int64, generator=generator)), 0
    seed, offset = generator.get_state().view(torch.int64).tolist()
    after = torch.tensor([seed, offset + (increment + 3) // 4 * 4], dtype=torch.int64)
    generator.set_state(after.view(torch.uint8))
    return seed, offset


def _check_numbers(name, numbers, n, device):
    """A seed or offset tensor, with as many values as there are outputs."""
    import torch

    if numbers.device != device:
        raise ValueError(f"{name} tensor must be on {device}, got {numbers.device}")
    if numbers.dtype not in (torch.int64, torch.uint64):
        raise ValueError(f"{name} tensor must be int64/uint64, got {numbers.dtype}")
    if numbers.ndim != 1:
        raise ValueError(f"{name} tensor must be 1D, got {numbers.ndim}D")
    if numbers.shape[0] not in (1, n):
        raise ValueError(f"{name} tensor length must be 1 or {n}, got {numbers.shape[0]}")
    return numbers.expand(n) if numbers.shape[0] == 1 else numbers


def random_numbers(seed, offset, generator, n, device):
    """seed, offset and row_streams for raddle.ops, of n outputs."""
    import torch

    if seed is None or offset is None:
        seed, offset = get_seed_and_offset(4, generator, device)
    if isinstance(seed, torch.Tensor) != isinstance(offset, torch.Tensor):
        raise ValueError("seed and offset must both be tensors or both be scalars")
    is_shared = True
    if isinstance(seed, torch.Tensor):
        is_shared = seed.numel() == 1 and offset.numel() == 1
        seed = _check_numbers("seed", seed, n, device)
        offset = _check_numbers("offset", offset, n, device)
    return {"seed": seed, "offset": offset, "row_streams": is_shared}


# -- parameters ---------------------------------------------------------------------------------


def rows_of(x):
    import torch

    return x.float() if x.dtype == torch.float64 else x


def _check_one_each(name, x, n):
    if x.ndim == 0:
        raise ValueError(
            f"{name}: Expected a 1D tensor of shape (batch_size,) or scalar, "
            "got a 0-dimensional tensor"
        )
    if x.ndim > 1:
        raise ValueError(f"{name}: Expected a 1D tensor or scalar, got a {x.ndim}D tensor")
    if x.shape[0] != n:
        raise ValueError(
            f"{name}: Sampling parameter tensor batch size mismatch: expected {n} values, "
            f"got {x.shape[0]}"
        )


def share(name, value, n, least):
    """A top_p or min_p from least to 1. Kernels take values out of range for the nearest."""
    import torch

    if not isinstance(value, torch.Tensor):
        return min(max(float(value), least), 1.0)
    _check_one_each(name, value, n)
    value = value.to(torch.float32)
    return value.clamp(least, 1.0) if value.device.type == "cpu" else value


def top_k_of(value, n):
    import torch

    if not isinstance(value, torch.Tensor):
        return min(int(value), _MOST_TOP_K)
    _check_one_each("top_k", value, n)
    if value.device.type == "cpu":
        return value.to(torch.int64).clamp(max=_MOST_TOP_K)
    return value.to(torch.int32)


def _validate_softmax_temperature(logits, temperature):
    """(tensor or None, number, whether none was given), by FlashInfer's name for its tests."""
    import torch

    if temperature is None:
        return None, 1.0, True
    if not isinstance(temperature, torch.Tensor):
        if isinstance(temperature, bool) or not isinstance(temperature, Real):
            raise TypeError(
                "temperature must be None, a real scalar or a tensor, "
                f"got {type(temperature).__name__}"
            )
        return None, float(temperature), False
    if temperature.ndim != 1:
        raise ValueError(f"temperature tensor must be 1D, got {temperature.ndim}D")
    if temperature.shape[0] != logits.shape[0]:
        raise ValueError(
            "temperature tensor length must equal logits.size(0), "
            f"{logits.shape[0]}, got {temperature.shape[0]}"
        )
    if temperature.device != logits.device:
        raise ValueError(
            "temperature tensor must be on the same device as logits, "
            f"{logits.device}, got {temperature.device}"
        )
    if temperature.dtype not in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
        raise ValueError(
            "temperature tensor must have dtype float16, bfloat16, float32 or float64, "
            f"got {temperature.dtype}"
        )
    return temperature, 0.0, False
