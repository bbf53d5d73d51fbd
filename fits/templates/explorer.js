/* The explorer of the report: the best N and D for a budget, its doubt, and what limits cost.
   Explorer.solve and what it calls are pure functions of (state, data); only Explorer.start touches the page.
   N in parameters, D in tokens, budgets in FLOPs, loss in the table's unit. */
var Explorer = (function () {
  "use strict";
  var REACH = 70; // log range of N searched below the largest size that the budget can train at all
  var GRID = 281;
  var GOLDEN = 0.6180339887498949;
  var LEVELS = { "80": [0.1, 0.9], "95": [0.025, 0.975] };
  var LEAST_DRAWS = 20; // below that no 95 % interval can be read off

  /* The law with one draw's parameters: loss at (log N, log D). */
  function lossOf(law, names, values) {
    var at = {};
    for (var i = 0; i < names.length; i++) at[names[i]] = values[i];
    if (law.kind === "kaplan") {
      var ratio = at.alphaN / at.alphaD, logNc = Math.log(at.Nc), logDc = Math.log(at.Dc);
      return function (n, d) {
        return Math.exp(at.alphaD * Math.log(Math.exp(ratio * (logNc - n)) + Math.exp(logDc - d)));
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

  function allowed(state, d) { // tokens spent: those that the budget pays, within the cap
    return state.maxTokens ? Math.min(d, Math.log(state.maxTokens)) : d;
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

  /* state: budget, and maxParams, maxTokens, inference (tokens served) or null, ratio (of the policy).
     Returns null where the law has no optimum there. */
  function solve(state, data) {
    var loss = lossOf(data.law, data.names, data.point), grid = gridOf(state, data);
    var found = best(loss, grid, state, data);
    if (!found) return null;
    var draws = { N: [], D: [], loss: [], ratio: [] }, losses = [];
    for (var k = 0; k < data.draws.length; k++) {
      var own = lossOf(data.law, data.names, data.draws[k]), b = best(own, grid, state, data);
      losses.push(own);
      draws.N.push(b ? Math.exp(b.n) : NaN);
      draws.D.push(b ? Math.exp(b.d) : NaN);
      draws.ratio.push(b ? Math.exp(b.d - b.n) : NaN);
      draws.loss.push(b ? b.loss : NaN);
    }
    var N = Math.exp(found.n), D = Math.exp(found.d);
    var near = 1 + 1e-6, spent = cost(data, state, found.n, found.d) / state.budget;
    var policy = policyAt(loss, state, data, found.loss);
    var half = Math.max(Math.log(12), 1.3 * Math.abs(Math.log(policy.N) - found.n));
    return {
      N: N, D: D, ratio: D / N, loss: found.loss,
      intervals: { N: spans(draws.N), D: spans(draws.D), ratio: spans(draws.ratio), loss: spans(draws.loss) },
      binds: {
        params: !!state.maxParams && N * near >= state.maxParams,
        tokens: !!state.maxTokens && D * near >= state.maxTokens
      },
      unspent: Math.max(0, 1 - spent), policy: policy,
      times: {
        budget: state.budget / data.range.flops[1], N: N / data.range.params[1], D: D / data.range.tokens[1]
      },
      below: state.budget < data.range.flops[0] * (1 - 1e-9),
      curve: curveAt(losses, loss, state, data, found.n, half)
    };
  }

  /* Text. */
  function digits(x, k) {
    if (Math.abs(x) >= Math.pow(10, k) - 0.5) return Math.abs(x) < 1e7 ? String(Math.round(x)) : scientific(x);
    var text = x.toPrecision(k);
    return text.indexOf(".") >= 0 && text.indexOf("e") < 0 ? text.replace(/\.?0+$/, "") : text;
  }

  function scientific(x) {
    var parts = x.toExponential(2).split("e");
    return parts[0].replace(/\.?0+$/, "") + "e" + parseInt(parts[1], 10);
  }

  function short(x) {
    if (!(x >= 1 && x < 1e15)) return scientific(x);
    var power = 0;
    while (power < 4 && x >= 999.5) { x /= 1000; power += 1; }
    return (x >= 999.5 ? String(Math.round(x)) : digits(x, 3)) + ["", "k", "M", "B", "T"][power];
  }

  /* A positive number as people write it (2e12, 1.5T, 70 B), null for nothing, NaN for anything else. */
  function read(text) {
    var clean = String(text).replace(/[\s,_]/g, "");
    if (clean === "") return null;
    var got = /^([0-9]*\.?[0-9]+(?:[eE][+-]?[0-9]+)?|[0-9]+\.)([kKmMbBgGtT]?)$/.exec(clean);
    if (!got) return NaN;
    var unit = { "": 1, k: 1e3, m: 1e6, b: 1e9, g: 1e9, t: 1e12 }[got[2].toLowerCase()];
    var value = parseFloat(got[1]) * unit;
    return value > 0 && isFinite(value) ? value : NaN;
  }

  /* What the numbers rest on, and which limit holds them, doubts first. */
  function sayings(result, state, data) {
    var out = [], far = [], words = { budget: "the budget", N: "N", D: "D" };
    for (var key in words) {
      if (result.times[key] > 1 + 1e-6) far.push(words[key] + " is " + digits(result.times[key], 3) + " times");
    }
    if (far.length) {
      out.push("Extrapolation: " + far.join(", ") + " the largest in the table" +
        (result.times.budget > 100 ? "; the intervals assume that the law keeps its form that far." : "."));
    } else if (result.below) {
      out.push("Extrapolation: the budget is below the smallest in the table.");
    } else out.push("Inside the table: budget, N and D are no larger than the largest fitted.");
    if (!result.intervals.N["95"]) {
      out.push(data.draws.length < LEAST_DRAWS ? "The fit has too few resamples for an interval, so the doubt is not known."
        : "More than one resample in a hundred has no optimum here, so no interval is given.");
    }
    if (result.binds.params) out.push("The cap on parameters holds N below its optimum.");
    if (result.binds.tokens) out.push("The cap on tokens holds D at " + short(result.D) + ".");
    if (result.unspent > 1e-6) {
      out.push("The caps leave " + digits(100 * result.unspent, 3) + " % of the budget unspent.");
    }
    var p = result.policy, head = "At " + digits(p.ratio, 3) + " tokens per parameter: N " + short(p.N) + ", D " +
      short(p.D) + ", loss " + digits(p.loss, 5) + ", caps aside; ";
    if (p.extra === null) out.push(head + "that cannot reach the loss above.");
    else if (p.extra >= 0) {
      out.push(head + "it takes " + (p.extra < 5e-5 ? "no" : digits(100 * p.extra, 2) + " %") +
        " more compute to reach the loss above.");
    } else out.push(head + "it reaches the loss above with " + digits(-100 * p.extra, 2) + " % less compute.");
    return out;
  }

  /* The picture: loss against N at the budget. */
  function picture(result, state) {
    var W = 640, H = 340, left = 58, right = 14, top = 26, bottom = 44, c = result.curve, low = Infinity, high = 0, i;
    var n0 = c.n[0], n1 = c.n[c.n.length - 1], policy = Math.log(result.policy.N);
    for (i = 0; i < c.n.length; i++) {
      low = Math.min(low, c["95"][i] ? c["95"][i][0] : c.loss[i]);
      high = Math.max(high, c["95"][i] ? c["95"][i][1] : c.loss[i]);
    }
    var roof = result.loss + 6 * Math.max(result.policy.loss - result.loss, 0.04 * result.loss);
    high = Math.min(high, roof) + 1e-9;
    low = low - 0.05 * (high - low);
    function X(n) { return left + (n - n0) / (n1 - n0) * (W - left - right); }
    function Y(v) { return top + (high - Math.min(Math.max(v, low), high)) / (high - low) * (H - top - bottom); }
    function point(n, v) { return X(n).toFixed(1) + "," + Y(v).toFixed(1); }
    function band(level, shade) {
      var up = [], down = [];
      for (var k = 0; k < c.n.length; k++) {
        if (!c[level][k]) return "";
        up.push(point(c.n[k], c[level][k][1]));
        down.unshift(point(c.n[k], c[level][k][0]));
      }
      return '<polygon points="' + up.concat(down).join(" ") + '" fill="' + shade + '"/>';
    }
    function text(x, y, words, anchor, colour) {
      return '<text x="' + x.toFixed(1) + '" y="' + y.toFixed(1) + '" text-anchor="' + anchor + '" fill="' + colour +
        '">' + words + "</text>";
    }
    function upright(n, colour, words, lower) { // two caps may stand close, so their words stand apart
      if (n < n0 || n > n1) return "";
      return '<line x1="' + X(n).toFixed(1) + '" x2="' + X(n).toFixed(1) + '" y1="' + top + '" y2="' + (H - bottom) +
        '" stroke="' + colour + '" stroke-dasharray="5 4"/>' +
        (lower ? text(X(n) + 5, top + 12, words, "start", colour)
          : text(X(n), top - 8, words, "middle", colour));
    }
    var out = band("95", "#d6e6f2") + band("80", "#a9cce3"), line = [];
    for (i = 0; i < c.n.length; i++) if (c.loss[i] <= high) line.push(point(c.n[i], c.loss[i]));
    out += '<polyline points="' + line.join(" ") + '" fill="none" stroke="#0072b2" stroke-width="2"/>';
    var marks = n1 - n0 > 9 ? [1] : [1, 3];
    for (i = Math.floor(n0 / Math.LN10) * marks.length; i < (n1 / Math.LN10 + 1) * marks.length; i++) {
      var size = marks[i % marks.length] * Math.pow(10, Math.floor(i / marks.length)), x = X(Math.log(size));
      if (Math.log(size) < n0 || Math.log(size) > n1) continue;
      out += '<line x1="' + x.toFixed(1) + '" x2="' + x.toFixed(1) + '" y1="' + (H - bottom) + '" y2="' + (H - bottom + 5) +
        '" stroke="#5c5c5c"/>' + text(x, H - bottom + 19, short(size), "middle", "#5c5c5c");
    }
    for (i = 0; i <= 4; i++) {
      var v = low + (high - low) * i / 4;
      out += text(left - 6, Y(v) + 4, v.toFixed(high - low < 0.1 ? 4 : high - low < 1 ? 3 : 2), "end", "#5c5c5c");
    }
    out += '<path d="M' + left + "," + top + "V" + (H - bottom) + "H" + (W - right) + '" fill="none" stroke="#5c5c5c"/>';
    out += text((left + W - right) / 2, H - 6, "N (parameters), on the tokens that the budget pays for", "middle", "#222");
    out += text(left, 14, "loss", "end", "#222");
    if (state.maxParams) out += upright(Math.log(state.maxParams), "#a94700", "cap on N", false);
    if (state.maxTokens && result.capSize !== null) out += upright(result.capSize, "#a94700", "cap on D", true);
    if (policy >= n0 && policy <= n1) {
      out += '<rect x="' + (X(policy) - 5).toFixed(1) + '" y="' + (Y(result.policy.loss) - 5).toFixed(1) +
        '" width="10" height="10" fill="#fff" stroke="#a94700" stroke-width="2"/>';
    }
    out += '<circle cx="' + X(Math.log(result.N)).toFixed(1) + '" cy="' + Y(result.loss).toFixed(1) +
      '" r="6" fill="#e69f00" stroke="#222"/>';
    return '<svg viewBox="0 0 ' + W + " " + H + '" role="img" aria-label="Predicted loss against N at ' +
      scientific(state.budget) + " FLOPs: lowest at N " + short(result.N) + '" font-size="13">' + out + "</svg>";
  }

  /* Log of the smallest N that spends the budget on no more tokens than the cap; null without one. */
  function sizeAtTokenCap(state, data) {
    if (!state.maxTokens) return null;
    var d = Math.log(state.maxTokens);
    return bisect(function (n) { return cost(data, state, n, d) > state.budget; }, -50, 100);
  }

  function rowsOf(result) {
    var lines = [["N* (parameters)", "N", short], ["D* (tokens)", "D", short],
      ["D*/N*", "ratio", function (x) { return digits(x, 4); }], ["loss", "loss", function (x) { return digits(x, 5); }]];
    var out = [];
    for (var i = 0; i < lines.length; i++) {
      var form = lines[i][2], got = result.intervals[lines[i][1]], row = [lines[i][0], form(result[lines[i][1]])];
      for (var level in LEVELS) row.push(got[level] ? form(got[level][0]) + " to " + form(got[level][1]) : "–");
      out.push(row);
    }
    return out;
  }

  /* The page. Field name -> id; every field but the slider is text. */
  var FIELDS = { budget: "explorer-budget", maxParams: "explorer-max-params", maxTokens: "explorer-max-tokens",
    inference: "explorer-inference", ratio: "explorer-ratio" };

  function start(page) {
    var data = JSON.parse(page.getElementById("explorer-data").textContent);
    var slider = page.getElementById("explorer-slider"), steps = 400;
    var low = Math.log(data.budget.low), high = Math.log(data.budget.top);
    function get(id) { return page.getElementById(id); }
    function show() {
      var state = {}, bad = [];
      for (var key in FIELDS) {
        var field = get(FIELDS[key]), value = read(field.value), needed = key === "budget" || key === "ratio";
        var wrong = (value !== null && isNaN(value)) || (needed && value === null);
        field.setAttribute("aria-invalid", wrong ? "true" : "false");
        if (wrong) bad.push(field.getAttribute("data-name"));
        state[key] = value;
      }
      var notes = get("explorer-notes"), body = get("explorer-body"), figure = get("explorer-figure");
      if (bad.length) {
        notes.innerHTML = "<li>Not a positive number: " + bad.join(", ") + ". Write 2e12, 1.5T or 70B.</li>";
        body.innerHTML = figure.innerHTML = "";
        return;
      }
      var result = solve(state, data);
      if (!result) {
        notes.innerHTML = "<li>The law has no best N at this budget under these limits.</li>";
        body.innerHTML = figure.innerHTML = "";
        return;
      }
      result.capSize = sizeAtTokenCap(state, data);
      var said = sayings(result, state, data), list = "", table = "", rows = rowsOf(result), i;
      for (i = 0; i < said.length; i++) {
        list += (said[i].indexOf("Extrapolation") === 0 ? '<li class="caution">' : "<li>") + said[i] + "</li>";
      }
      for (i = 0; i < rows.length; i++) {
        table += '<tr><th scope="row">' + rows[i][0] + "</th><td>" + rows[i].slice(1).join("</td><td>") + "</td></tr>";
      }
      notes.innerHTML = list;
      body.innerHTML = table;
      figure.innerHTML = picture(result, state);
    }
    function slide() {
      get(FIELDS.budget).value = scientific(Math.exp(low + (high - low) * slider.value / steps));
      slider.setAttribute("aria-valuetext", get(FIELDS.budget).value + " FLOPs");
      show();
    }
    function typed() {
      var value = read(get(FIELDS.budget).value);
      if (value > 0) slider.value = Math.round(steps * (Math.log(value) - low) / (high - low));
      show();
    }
    slider.addEventListener("input", slide);
    for (var key in FIELDS) get(FIELDS[key]).addEventListener("input", typed);
    get("explorer-form").addEventListener("submit", function (event) { event.preventDefault(); });
    typed();
    get("explorer-live").hidden = false;
  }

  return { solve: solve, start: start, read: read, short: short, sayings: sayings, rowsOf: rowsOf };
})();
if (typeof document !== "undefined") Explorer.start(document);
