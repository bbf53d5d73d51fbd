/* The explorer of the report: the best N and D for a budget, its doubt, and what limits cost.
   All here are pure functions of (state, data); explorer_page.js shows what they give.
   N in parameters, D in tokens, budgets in FLOPs, loss in the table's unit. */
var Explorer = (function () {
  "use strict";
  var REACH = 70; // log range of N searched below the largest size that the budget can train at all
  var GRID = 281;
  var GOLDEN = 0.6180339887498949;
  var LEVELS = { "80": [0.1, 0.9], "95": [0.025, 0.975] };
  var LEAST_DRAWS = 20; // below that no 95 % interval can be read off

  /* Log of what a size or a number of tokens is worth, of which only some is new (logs x and fresh):
     U + U R (1 - exp(-repeats / R)), Muennighoff et al. 2023, eq. 5. */
  function worth(x, fresh, decay) {
    if (x <= fresh) return x;
    return fresh + Math.log(1 + decay * (1 - Math.exp(-(Math.exp(x - fresh) - 1) / decay)));
  }

  /* The law with one draw's parameters: loss at (log N, log D); unique tokens matter to one that repeats. */
  function lossOf(law, names, values, unique) {
    var at = {};
    for (var i = 0; i < names.length; i++) at[names[i]] = values[i];
    if (law.kind === "kaplan") {
      var ratio = at.alphaN / at.alphaD, logNc = Math.log(at.Nc), logDc = Math.log(at.Dc);
      return function (n, d) {
        return Math.exp(at.alphaD * Math.log(Math.exp(ratio * (logNc - n)) + Math.exp(logDc - d)));
      };
    }
    if (law.kind === "overtraining") { // M^eta C^-eta = (6 N^2)^-eta, and (6 D^2)^-eta with M inverted
      return function (n, d) {
        var size = Math.exp(-at.eta * (Math.log(6) + 2 * n)), tokens = Math.exp(-at.eta * (Math.log(6) + 2 * d));
        return at.E + at.a * size + at.b * tokens;
      };
    }
    if (law.kind === "repetition") {
      var alpha = at[law.alpha], beta = at[law.beta], u = unique ? Math.log(unique) : Infinity;
      var most = (Math.log(alpha * at.A) - Math.log(beta * at.B) + beta * u) / alpha; // the best N for U tokens
      return function (n, d) {
        return at.E + at.A * Math.exp(-alpha * worth(n, most, at.R_N)) + at.B * Math.exp(-beta * worth(d, u, at.R_D));
      };
    }
    var terms = [];
    for (var t = 0; t < law.terms.length; t++) {
      var term = law.terms[t];
      terms.push([at[term.c], term.N ? at[term.N] : 0, term.D ? at[term.D] : 0]);
    }
    return function (n, d) {
      var total = 0;
      for (var k = 0; k < terms.length; k++) {
        total += terms[k][0] * Math.exp(-terms[k][1] * n - terms[k][2] * d);
      }
      return total;
    };
  }

  function place(axis, x) { // the cell of x on an increasing axis and how far along it lies; ends are held
    var last = axis.length - 1;
    if (!(x > axis[0])) return [0, 0];
    if (x >= axis[last]) return [last - 1, 1];
    var low = 0, high = last;
    while (high - low > 1) {
      var middle = (low + high) >> 1;
      if (axis[middle] <= x) low = middle; else high = middle;
    }
    return [low, (x - axis[low]) / (axis[high] - axis[low])];
  }

  /* Log of the training FLOPs over 6 N D: linear in log D, cubic in log N (Catmull-Rom, so that its slope,
     which moves the optimum, has no corners). */
  function surcharge(table, n, d) {
    if (!table) return 0;
    var i = place(table.logN, n), j = place(table.logD, d), z = table.value;
    function row(k) { return z[k][j[0]] * (1 - j[1]) + z[k][j[0] + 1] * j[1]; }
    var at = i[0], t = i[1], low = row(at), high = row(at + 1);
    var before = at > 0 ? row(at - 1) : 2 * low - high;
    var after = at + 2 < z.length ? row(at + 2) : 2 * high - low;
    var up = 0.5 * (high - before), out = 0.5 * (after - low);
    return low + t * (up + t * (3 * (high - low) - 2 * up - out + t * (up + out - 2 * (high - low))));
  }

  /* Training FLOPs, and 2 N for each token served. */
  function cost(data, state, n, d) {
    return 6 * Math.exp(n + d + surcharge(data.flops, n, d)) + 2 * Math.exp(n) * (state.inference || 0);
  }

  function bisect(over, low, high) { // the largest x for which over(x) is false
    for (var i = 0; i < 80; i++) {
      var middle = 0.5 * (low + high);
      if (over(middle)) high = middle; else low = middle;
    }
    return low;
  }

  /* Log of the tokens that spend the budget on a model of log size n; NaN where one token costs more. */
  function tokensFor(data, state, n) {
    var left = state.budget - 2 * Math.exp(n) * (state.inference || 0);
    if (!data.flops) {
      var d = Math.log(left / 6) - n;
      return left > 0 && d > -1e-9 ? d : NaN; // the last one is the largest size itself, rounded
    }
    if (cost(data, state, n, 0) > state.budget * (1 + 1e-9)) return NaN;
    return bisect(function (x) { return cost(data, state, n, x) > state.budget; }, 0, 100);
  }

  /* The sizes searched: from one that nobody trains to the largest allowed. */
  function reach(state, data) {
    var top = bisect(function (n) { return cost(data, state, n, 0) > state.budget; }, -50, 100);
    var high = state.maxParams ? Math.min(top, Math.log(state.maxParams)) : top;
    return { low: top - REACH, high: high, capped: high < top };
  }

  /* The most tokens allowed, by the cap on them or on epochs; Infinity without either. */
  function tokenCap(state) {
    var epochs = state.unique && state.maxEpochs ? state.unique * state.maxEpochs : Infinity;
    return Math.min(state.maxTokens || Infinity, epochs);
  }

  function allowed(state, d) { // tokens spent: those that the budget pays, within the cap
    return Math.min(d, Math.log(tokenCap(state)));
  }

  function golden(f, low, high) {
    var a = high - GOLDEN * (high - low), b = low + GOLDEN * (high - low), fa = f(a), fb = f(b);
    while (high - low > 1e-7) { // a loss near its minimum is flat below this
      if (fa <= fb) { high = b; b = a; fb = fa; a = high - GOLDEN * (high - low); fa = f(a); }
      else { low = a; a = b; fa = fb; b = low + GOLDEN * (high - low); fb = f(b); }
    }
    return 0.5 * (low + high);
  }

  /* The best log N, log D and loss of one draw; null where the loss has no minimum among the sizes. */
  function best(loss, grid, state, data) {
    var at = -1, least = Infinity;
    for (var i = 0; i < grid.n.length; i++) {
      var value = loss(grid.n[i], grid.d[i]);
      if (value < least) { least = value; at = i; }
    }
    var last = grid.n.length - 1;
    if (at <= 0 || (at === last && !grid.capped)) return null;
    function along(n) { return loss(n, allowed(state, tokensFor(data, state, n))); }
    var high = grid.n[Math.min(at + 1, last)];
    var n = golden(along, grid.n[at - 1], high), found = along(n);
    if (at === last && loss(grid.n[last], grid.d[last]) <= found) n = grid.n[last];
    var d = allowed(state, tokensFor(data, state, n));
    return { n: n, d: d, loss: loss(n, d) };
  }

  function gridOf(state, data) {
    var ends = reach(state, data), n = [], d = [];
    for (var i = 0; i < GRID; i++) {
      n.push(i === GRID - 1 ? ends.high : ends.low + (ends.high - ends.low) * i / (GRID - 1));
      d.push(allowed(state, tokensFor(data, state, n[i])));
    }
    return { n: n, d: d, capped: ends.capped };
  }

  function quantile(sorted, p) {
    var h = (sorted.length - 1) * p, low = Math.floor(h), high = Math.min(low + 1, sorted.length - 1);
    return sorted[low] + (h - low) * (sorted[high] - sorted[low]);
  }

  function ascending(values) { return values.slice().sort(function (x, y) { return x - y; }); }

  /* 80 and 95 % intervals, null with too few draws or where more than one in a hundred has no optimum. */
  function spans(values) {
    var finite = [], out = { "80": null, "95": null };
    for (var i = 0; i < values.length; i++) if (isFinite(values[i])) finite.push(values[i]);
    if (finite.length < LEAST_DRAWS || finite.length < 0.99 * values.length) return out;
    finite = ascending(finite);
    for (var level in LEVELS) {
      out[level] = [quantile(finite, LEVELS[level][0]), quantile(finite, LEVELS[level][1])];
    }
    return out;
  }

  /* N, D and loss at D/N = ratio, and the share of compute beyond the budget with which that reaches a loss. */
  function policyAt(loss, state, data, target) {
    var ratio = Math.log(state.ratio);
    var n = bisect(function (x) { return cost(data, state, x, x + ratio) > state.budget; }, -50, 100);
    var out = { ratio: state.ratio, N: Math.exp(n), D: Math.exp(n + ratio), loss: loss(n, n + ratio) };
    out.extra = null;
    if (loss(n + 18, n + 18 + ratio) <= target) {
      var enough = bisect(function (x) { return loss(x, x + ratio) <= target; }, n - 18, n + 18);
      out.extra = cost(data, state, enough, enough + ratio) / state.budget - 1;
    }
    return out;
  }

  /* Loss against N at this budget, with its 95 and 80 % band over the draws. */
  function curveAt(losses, loss, state, data, centre, half) {
    var out = { n: [], loss: [], "80": [], "95": [] }, points = 61;
    for (var i = 0; i < points; i++) {
      var n = centre - half + 2 * half * i / (points - 1), d = allowed(state, tokensFor(data, state, n));
      if (isNaN(d)) continue;
      out.n.push(n);
      out.loss.push(loss(n, d));
      var got = [];
      for (var k = 0; k < losses.length; k++) got.push(losses[k](n, d));
      var s = spans(got);
      out["80"].push(s["80"]);
      out["95"].push(s["95"]);
    }
    return out;
  }

  /* state: budget, and maxParams, maxTokens, inference (tokens served), unique (tokens before any is repeated),
     maxEpochs or null, ratio (of the policy). Returns null where the law has no optimum there. */
  function solve(state, data) {
    var loss = lossOf(data.law, data.names, data.point, state.unique), grid = gridOf(state, data);
    var found = best(loss, grid, state, data);
    if (!found) return null;
    var draws = { N: [], D: [], loss: [], ratio: [], epochs: [] }, losses = [];
    for (var k = 0; k < data.draws.length; k++) {
      var own = lossOf(data.law, data.names, data.draws[k], state.unique), b = best(own, grid, state, data);
      losses.push(own);
      draws.N.push(b ? Math.exp(b.n) : NaN);
      draws.D.push(b ? Math.exp(b.d) : NaN);
      draws.ratio.push(b ? Math.exp(b.d - b.n) : NaN);
      draws.loss.push(b ? b.loss : NaN);
      draws.epochs.push(b && state.unique ? Math.exp(b.d) / state.unique : NaN);
    }
    var N = Math.exp(found.n), D = Math.exp(found.d);
    var near = 1 + 1e-6, spent = cost(data, state, found.n, found.d) / state.budget;
    var policy = policyAt(loss, state, data, found.loss);
    var half = Math.max(Math.log(12), 1.3 * Math.abs(Math.log(policy.N) - found.n));
    var times = {
      budget: state.budget / data.range.flops[1], N: N / data.range.params[1], D: D / data.range.tokens[1]
    };
    var repeated = data.law.kind === "repetition" && state.unique;
    if (repeated) times.epochs = Math.max(D / state.unique, 1) / Math.max(data.range.epochs[1], 1);
    return {
      N: N, D: D, ratio: D / N, loss: found.loss, epochs: repeated ? D / state.unique : null,
      intervals: {
        N: spans(draws.N), D: spans(draws.D), ratio: spans(draws.ratio), loss: spans(draws.loss),
        epochs: spans(draws.epochs)
      },
      binds: {
        params: !!state.maxParams && N * near >= state.maxParams,
        tokens: D * near >= tokenCap(state)
      },
      unspent: Math.max(0, 1 - spent), policy: policy, times: times,
      below: state.budget < data.range.flops[0] * (1 - 1e-9),
      curve: curveAt(losses, loss, state, data, found.n, half)
    };
  }

  /* Log of the smallest N that spends the budget on no more tokens than the cap; null without one. */
  function sizeAtTokenCap(state, data) {
    if (!isFinite(tokenCap(state))) return null;
    var d = Math.log(tokenCap(state));
    return bisect(function (n) { return cost(data, state, n, d) > state.budget; }, -50, 100);
  }

  return { solve: solve, tokenCap: tokenCap, sizeAtTokenCap: sizeAtTokenCap, LEVELS: LEVELS, LEAST_DRAWS: LEAST_DRAWS };
})();
