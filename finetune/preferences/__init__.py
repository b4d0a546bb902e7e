"""From a model to preferences: samples of its answers, ranked by metrics, as pairs of a better and a worse one."""
