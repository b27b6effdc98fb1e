"""What our own kernels cost: FID by the nuclear norm against the square root of a matrix, and the rasteriser.

    python -m experiments.fid_benchmark
"""
import argparse
import time

import numpy as np
import torch
from scipy.linalg import sqrtm

from evaluate import fid
from geometry.mesh import rasterize, surface_mesh
from support.launch import run_cli, within


def fid_by_root(a, b):
    """FID of features (N, F) and (M, F) as it is usually computed, by scipy.linalg.sqrtm."""
    gap = a.mean(axis=0) - b.mean(axis=0)
    c1, c2 = np.cov(a, rowvar=False), np.cov(b, rowvar=False)
    return gap @ gap + np.trace(c1 + c2 - 2 * np.real(sqrtm(c1 @ c2)))


def benchmark_fid(num, width, rounds):
    """Times `fid` and `fid_by_root` in turn on the same features, two sets (num, width), and prints their medians."""
    rng = np.random.default_rng(0)
    a, b = [rng.standard_normal((num, width)) * scale + scale for scale in (1.0, 1.2)]
    print(f"FID of 2 x {num} images with {width} features each, {rounds} rounds in turn; some ten seconds a round at "
          "the default size", flush=True)
    times, values = {fid: [], fid_by_root: []}, {}
    for _ in range(rounds):
        for route in times:
            start = time.perf_counter()
            values[route] = route(a, b)
            times[route].append(time.perf_counter() - start)
    nuclear, root = float(np.median(times[fid])), float(np.median(times[fid_by_root]))
    print(f"nuclear norm {nuclear:.2f} s ({values[fid]:.6f}), scipy.linalg.sqrtm {root:.2f} s "
          f"({values[fid_by_root]:.6f}): {nuclear / root:.3f} of the time")


def benchmark_rasterizer():
    """Times the rasteriser on a ball of some 50,000 triangles, in four views, and prints it."""
    axis = torch.linspace(-0.5, 0.5, 66)
    ball = torch.stack(torch.meshgrid(axis, axis, axis, indexing="ij")).norm(dim=0) - 0.46          # (66, 66, 66)
    mesh = surface_mesh(ball)
    start = time.perf_counter()
    rasterize(mesh, 512)
    print(f"rasteriser: {len(mesh.faces)} triangles at 4 x 512 x 512 in {time.perf_counter() - start:.2f} s on "
          f"{torch.get_num_threads()} thread(s)")


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--num", type=within(2, 50000), default=1000, help="images a set (default %(default)s)")
    add("--width", type=within(1, 2048), default=2048, help="features an image (default %(default)s)")
    add("--rounds", type=within(1, 10 ** 4), default=3, help="how often each is timed (default %(default)s)")
    args = parser.parse_args(argv)
    benchmark_fid(args.num, args.width, args.rounds)
    benchmark_rasterizer()


if __name__ == "__main__":
    run_cli(main)
