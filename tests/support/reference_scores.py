"""The metrics of images as slow and obvious numpy, float64 unless the definition rounds."""

import numpy as np
from scipy import linalg


def frechet_distance(one, other):
    """By the matrix square root of the product, as the official evaluation has it."""
    (mean, covariance), (other_mean, other_covariance) = one, other
    root = linalg.sqrtm(covariance @ other_covariance).real
    return ((mean - other_mean) ** 2).sum() + np.trace(covariance + other_covariance - 2 * root)


def kernel_distance(one, other):
    """The unbiased squared MMD with the kernel (u v / D + 1)^3, pair by pair."""

    def kernel(u, v):
        return (sum(float(a) * float(b) for a, b in zip(u, v, strict=True)) / len(u) + 1.0) ** 3

    def among(features):
        pairs = [
            kernel(u, v) for i, u in enumerate(features) for j, v in enumerate(features) if i != j
        ]
        return sum(pairs) / len(pairs)

    between = [kernel(u, v) for u in one for v in other]
    return among(one) + among(other) - 2.0 * sum(between) / len(between)


def inception_score(logits, split_size):
    scores = []
    for start in range(0, len(logits), split_size):
        part = logits[start : start + split_size]
        p = np.exp(part) / np.exp(part).sum(axis=1, keepdims=True)
        marginal = p.mean(axis=0)
        divergences = [sum(row * (np.log(row) - np.log(marginal))) for row in p]
        scores.append(np.exp(np.mean(divergences)))
    return np.mean(scores)


def squared_distance(u, v, dtype):
    """Every intermediate number is of `dtype`, sums are accumulated in float32."""
    u, v = u.astype(dtype), v.astype(dtype)
    norm_u = np.sum((u * u).astype(np.float32)).astype(dtype)
    norm_v = np.sum((v * v).astype(np.float32)).astype(dtype)
    product = np.dot(u.astype(np.float32), v.astype(np.float32)).astype(dtype)
    return max(dtype(dtype(norm_u - dtype(2) * product) + norm_v), dtype(0))


def precision_and_recall(reference, samples, neighbours, dtype):
    def radius(features, i):
        return sorted(squared_distance(features[i], v, dtype) for v in features)[neighbours]

    def share_on_manifold(points, features):
        radii = [radius(features, i) for i in range(len(features))]
        inside = [
            any(
                squared_distance(v, point, dtype) <= r for v, r in zip(features, radii, strict=True)
            )
            for point in points
        ]
        return np.mean(inside)

    return share_on_manifold(samples, reference), share_on_manifold(reference, samples)


def resize(image, size):
    """TensorFlow 1's ResizeBilinear with align_corners=False, pixel by pixel; image (H, W)."""
    (height, width), out = image.shape, np.empty((size, size), np.float32)
    for i in range(size):
        for j in range(size):
            y = np.float32(i) * np.float32(height / size)
            x = np.float32(j) * np.float32(width / size)
            top, left = int(y), int(x)
            bottom, right = min(top + 1, height - 1), min(left + 1, width - 1)
            dy, dx = y - top, x - left
            upper = image[top, left] + (image[top, right] - image[top, left]) * dx
            lower = image[bottom, left] + (image[bottom, right] - image[bottom, left]) * dx
            out[i, j] = upper + (lower - upper) * dy
    return out
