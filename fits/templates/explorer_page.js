/* What the report's explorer shows of Explorer.solve: words, a table and a picture. Only start touches the page. */
(function (Explorer) {
  "use strict";
  var LEVELS = Explorer.LEVELS, LEAST_DRAWS = Explorer.LEAST_DRAWS, tokenCap = Explorer.tokenCap;

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
    var out = [], far = [], words = { budget: "the budget", N: "N", D: "D", epochs: "the number of epochs" };
    for (var key in result.times) {
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
    var byEpochs = !(tokenCap(state) >= (state.maxTokens || Infinity));
    if (result.binds.tokens) {
      out.push("The cap on " + (byEpochs ? "epochs" : "tokens") + " holds D at " + short(result.D) + ".");
    }
    if (result.epochs > 1) out.push("Every token is seen " + digits(result.epochs, 3) + " times.");
    if (state.maxEpochs && !state.unique) {
      out.push("No epochs are capped: without a number of unique tokens none is seen twice.");
    }
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
    if (result.capSize !== null) out += upright(result.capSize, "#a94700", "cap on D", true);
    if (policy >= n0 && policy <= n1) {
      out += '<rect x="' + (X(policy) - 5).toFixed(1) + '" y="' + (Y(result.policy.loss) - 5).toFixed(1) +
        '" width="10" height="10" fill="#fff" stroke="#a94700" stroke-width="2"/>';
    }
    out += '<circle cx="' + X(Math.log(result.N)).toFixed(1) + '" cy="' + Y(result.loss).toFixed(1) +
      '" r="6" fill="#e69f00" stroke="#222"/>';
    return '<svg viewBox="0 0 ' + W + " " + H + '" role="img" aria-label="Predicted loss against N at ' +
      scientific(state.budget) + " FLOPs: lowest at N " + short(result.N) + '" font-size="13">' + out + "</svg>";
  }

  function rowsOf(result) {
    var lines = [["N* (parameters)", "N", short], ["D* (tokens)", "D", short],
      ["D*/N*", "ratio", function (x) { return digits(x, 4); }], ["loss", "loss", function (x) { return digits(x, 5); }]];
    if (result.epochs !== null) lines.push(["epochs", "epochs", function (x) { return digits(x, 3); }]);
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
  var REPETITION_FIELDS = { unique: "explorer-unique", maxEpochs: "explorer-max-epochs" };

  function start(page) {
    var data = JSON.parse(page.getElementById("explorer-data").textContent);
    var slider = page.getElementById("explorer-slider"), steps = 400;
    var low = Math.log(data.budget.low), high = Math.log(data.budget.top), fields = {}, name;
    for (name in FIELDS) fields[name] = FIELDS[name];
    if (data.law.kind === "repetition") for (name in REPETITION_FIELDS) fields[name] = REPETITION_FIELDS[name];
    function get(id) { return page.getElementById(id); }
    function show() {
      var state = {}, bad = [];
      for (var key in fields) {
        var field = get(fields[key]), value = read(field.value), needed = key === "budget" || key === "ratio";
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
      var result = Explorer.solve(state, data);
      if (!result) {
        notes.innerHTML = "<li>The law has no best N at this budget under these limits.</li>";
        body.innerHTML = figure.innerHTML = "";
        return;
      }
      result.capSize = Explorer.sizeAtTokenCap(state, data);
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
      get(fields.budget).value = scientific(Math.exp(low + (high - low) * slider.value / steps));
      slider.setAttribute("aria-valuetext", get(fields.budget).value + " FLOPs");
      show();
    }
    function typed() {
      var value = read(get(fields.budget).value);
      if (value > 0) slider.value = Math.round(steps * (Math.log(value) - low) / (high - low));
      show();
    }
    slider.addEventListener("input", slide);
    for (name in fields) get(fields[name]).addEventListener("input", typed);
    get("explorer-form").addEventListener("submit", function (event) { event.preventDefault(); });
    typed();
    get("explorer-live").hidden = false;
  }

  Explorer.start = start;
  Explorer.read = read;
})(Explorer);
if (typeof document !== "undefined") Explorer.start(document);
