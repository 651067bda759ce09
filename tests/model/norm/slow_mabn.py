"""MABN written slowly from its formulas: Python loops over plain lists and float64, one value after another."""
import math


class SlowMABN:
    """x and dy as nested lists [N][C][P] (P values a plane). No tensors, nothing shared with the layer under test."""

    def __init__(self, channels, K, eps=1e-5, momentum=0.98, warmup_iters=100, group=None):
        self.w, self.b = [1.0] * channels, [0.0] * channels
        self.channels, self.K, self.eps, self.momentum, self.warmup = channels, K, eps, momentum, warmup_iters
        self.group, self.t = group, 0
        self.running_var = [1.0] * channels
        self.x2 = [[0.0] * K for _ in range(channels)]      # ring buffers; with groups, lists of the newest
        self.gz = [[0.0] * K for _ in range(channels)]

    def _groups(self, n):
        size = self.group or n
        return [list(range(start, min(start + size, n))) for start in range(0, n, size)]

    def _average(self, buffers, c, news):
        """The moment used for each group's own moment in `news`; `buffers[c]` takes them in."""
        own = self.t <= self.K or self.t < self.warmup
        used = []
        for new in news:
            if self.group:
                buffers[c] = [*buffers[c], new][-self.K:]
            else:
                buffers[c][self.t % self.K] = new
            used.append(new if own else math.fsum(buffers[c]) / self.K)
        return used

    def forward(self, x):
        self.t += 1
        self.x, n = x, len(x)
        self.groups = self._groups(n)
        self.var, self.r = [], []
        y = [[None] * self.channels for _ in range(n)]
        for c in range(self.channels):
            chis = []
            for members in self.groups:
                squares = [v * v for i in members for v in x[i][c]]
                chis.append(math.fsum(squares) / len(squares))
            var = self._average(self.x2, c, chis)
            running_std = math.sqrt(self.running_var[c] + self.eps)
            r = [1.0 if self.t <= max(1000, self.warmup) else min(max(math.sqrt(v + self.eps) / running_std, 1 / 5), 5)
                 for v in var]
            for k, members in enumerate(self.groups):
                for i in members:
                    y[i][c] = [self.w[c] * r[k] * v / math.sqrt(var[k] + self.eps) + self.b[c] for v in x[i][c]]
            mean_var = math.fsum(var) / len(var)
            self.running_var[c] = self.momentum * self.running_var[c] + (1 - self.momentum) * mean_var
            self.var.append(var), self.r.append(r)
        return y

    def backward(self, dy):
        n = len(dy)
        dx = [[None] * self.channels for _ in range(n)]
        dw, db = [], []
        for c in range(self.channels):
            psis, w_terms, b_terms = [], [], []
            for k, members in enumerate(self.groups):
                std, r = math.sqrt(self.var[c][k] + self.eps), self.r[c][k]
                pairs = [(d, v / std) for i in members for d, v in zip(dy[i][c], self.x[i][c])]
                psis.append(math.fsum(d * self.w[c] * r * z for d, z in pairs) / len(pairs))
                w_terms += [d * r * z for d, z in pairs]
                b_terms += [d for d, _ in pairs]
            used = self._average(self.gz, c, psis)
            for k, members in enumerate(self.groups):
                std, r = math.sqrt(self.var[c][k] + self.eps), self.r[c][k]
                for i in members:
                    dx[i][c] = [(d * self.w[c] * r - v / std * used[k]) / std for d, v in zip(dy[i][c], self.x[i][c])]
            dw.append(math.fsum(w_terms)), db.append(math.fsum(b_terms))
        return dx, dw, db
