// Draws the dashboard from props.value; runs once, when it loads. All text goes in with textContent.

const find = (name, part = element) => part.querySelector('.' + name);
const put = (part, words) => { if (part.textContent !== words) part.textContent = words; };
const SVG = 'http://www.w3.org/2000/svg';
const demo = find('dash-demo'), form = find('dash-budget-form');
const open = new Set();  // titles of the tables that a person has opened
let shown = '';  // the budgets as they were drawn

function node(name, className, text) {
  const made = document.createElement(name);
  if (className) made.className = className;
  if (text !== undefined) made.textContent = text;
  return made;
}

function shape(name, attributes) {
  const made = document.createElementNS(SVG, name);
  for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
  return made;
}

function row(cells, head) {
  const made = node('tr');
  cells.forEach((words, place) => {
    const cell = node(head || place === 0 ? 'th' : 'td', '', words);
    if (head) cell.scope = 'col'; else if (place === 0) cell.scope = 'row';
    made.append(cell);
  });
  return made;
}

function fill(table, head, rows) {
  if (head) table.tHead.replaceChildren(row(head, true));
  table.tBodies[0].replaceChildren(...rows.map(cells => row(cells)));
}

function draw() {
  const data = props.value || null;
  const error = data && data.error;
  put(find('dash-error'), error || '');
  find('dash-error').hidden = !error;
  find('dash').hidden = !data || Boolean(error);
  if (!data || error) return;
  put(find('dash-period'), data.period);
  find('dash-quiet').hidden = !data.quiet;
  find('dash-all').hidden = data.quiet;
  put(find('dash-demo-state'), data.demonstration || '');
  demo.disabled = Boolean(data.demonstration);
  if (!data.quiet) drawAll(data);
  drawBudgets(data.budgets);
  find('dash-recent').hidden = !data.recent.length;
  fill(find('dash-recent').querySelector('table'), null, data.recent);
}

function drawAll(data) {
  find('dash-figures').replaceChildren(...data.figures.map(figure => {
    const part = find('figure-template').content.firstElementChild.cloneNode(true);
    put(part.querySelector('dt'), figure.name);
    put(find('figure-value', part), figure.value);
    const change = find('figure-change', part);
    put(change, figure.change ? figure.change + ' (was ' + figure.before + ')' : 'no such value before');
    change.dataset.judged = figure.judged;
    return part;
  }));
  find('dash-notes').replaceChildren(...data.notes.map(words => node('li', '', words)));
  find('dash-branches').hidden = !data.branches.length;
  fill(find('dash-branches').querySelector('table'), ['Branch', ...data.heads], data.branches.map(one => [one.name, ...one.cells]));
  const focused = document.activeElement && document.activeElement.closest('.dash-chart');
  if (focused && element.contains(focused) && focused.querySelector('details[open]')) return;  // somebody reads a table
  find('dash-charts').replaceChildren(
    ...data.charts.map(chartOf),
    scatterOf(data.dots),
    barsOf('Cost per model', 'US dollars', data.amounts, 'No call in this period had a known price.'),
    barsOf('Errors by class', 'calls', data.errors, 'No call in this period failed.'));
}

// ── Charts ──────────────────────────────────────────────────────────────────────────────────────────────────────────

function blank(title, about) {
  const part = find('chart-template').content.firstElementChild.cloneNode(true);
  put(find('chart-title', part), title);
  put(find('chart-about', part), about);
  find('dash-frame', part).setAttribute('aria-label', title + ' as a table');
  const details = part.querySelector('details');
  details.open = open.has(title);
  details.addEventListener('toggle', () => { if (details.open) open.add(title); else open.delete(title); });
  return part;
}

function chartOf(chart) {
  const part = blank(chart.title, chart.about), svg = part.querySelector('svg');
  const count = chart.starts.length, top = chart.top || 1;
  const x = place => count < 2 ? 300 : place / (count - 1) * 600;
  const y = value => 196 - value / top * 184;
  const grid = [0, 0.5, 1].map(share => shape('line', {class: 'grid', x1: 0, x2: 600, y1: y(share * top), y2: y(share * top)}));
  const lines = chart.lines.flatMap((line, place) => pieces(line.values).map(piece => piece.length > 1
    ? shape('polyline', {class: 'line colour-' + place % 8, points: piece.map(at => x(at).toFixed(1) + ',' + y(line.values[at]).toFixed(1)).join(' ')})
    : shape('line', {class: 'line alone colour-' + place % 8, x1: x(piece[0]) - 0.01, x2: x(piece[0]) + 0.01, y1: y(line.values[piece[0]]), y2: y(line.values[piece[0]])})));
  svg.replaceChildren(...grid, ...lines);
  svg.setAttribute('aria-label', chart.title + ' ' + chart.about + ', at most ' + (chart.high || 'nothing') + '. The table has all values.');
  put(find('chart-high', part), chart.high || 'nothing known in this period');
  put(find('chart-first', part), chart.starts[0] || '');
  put(find('chart-last', part), (chart.starts[count - 1] || '') + ' ' + chart.zone);
  legend(part, chart.lines.map(line => line.name));
  fill(part.querySelector('table'), ['From', ...chart.lines.map(line => line.name)],
    chart.starts.map((start, place) => [start, ...chart.lines.map(line => line.words[place])]));
  hover(part, count, place => [chart.starts[place], ...chart.lines.map(line => line.name + ': ' + line.words[place])]);
  return part;
}

function pieces(values) {  // runs of places that have a value
  const found = [];
  values.forEach((value, place) => {
    if (value === null) return;
    if (place && values[place - 1] !== null) found[found.length - 1].push(place); else found.push([place]);
  });
  return found;
}

function legend(part, names) {
  find('chart-legend', part).replaceChildren(...names.map((name, place) => {
    const item = node('li', 'colour-' + place % 8);
    item.append(node('i'), node('bdi', '', name));
    return item;
  }));
}

function hover(part, count, words) {
  const frame = find('chart-frame', part), tip = find('chart-tip', part), cursor = find('chart-cursor', part);
  const leave = () => { tip.hidden = cursor.hidden = true; };
  frame.addEventListener('pointerleave', leave);
  frame.addEventListener('pointermove', event => {
    if (!count) return;
    const box = frame.getBoundingClientRect(), share = Math.min(1, Math.max(0, (event.clientX - box.left) / box.width));
    const place = count < 2 ? 0 : Math.round(share * (count - 1)), at = count < 2 ? 0.5 : place / (count - 1);
    tip.replaceChildren(...words(place).map((text, index) => node(index ? 'span' : 'b', '', text)));
    tip.hidden = cursor.hidden = false;
    cursor.style.left = 100 * at + '%';
    tip.style.left = Math.min(Math.max(0, at * box.width + 10), Math.max(0, box.width - tip.offsetWidth)) + 'px';
  });
}

function scatterOf(dots) {
  const part = blank('Latency against reward', 'a dot per model: which gives most for its time'), svg = part.querySelector('svg');
  const known = dots.filter(dot => dot.y !== null);
  const wide = Math.max(1e-9, ...known.map(dot => dot.x)) * 1.1, most = Math.max(1, ...known.map(dot => dot.calls));
  svg.setAttribute('preserveAspectRatio', 'xMidYMid meet');
  const grid = [0, 0.5, 1].map(share => shape('line', {class: 'grid', x1: 0, x2: 600, y1: 190 - share * 180, y2: 190 - share * 180}));
  svg.replaceChildren(...grid, ...known.map((dot, place) => {
    const circle = shape('circle', {class: 'dot colour-' + place % 8, cx: 8 + dot.x / wide * 580, cy: 190 - dot.y * 180, r: 5 + 8 * Math.sqrt(dot.calls / most)});
    const title = document.createElementNS(SVG, 'title');
    title.textContent = dot.name + ': reward ' + dot.cells[2] + ', median latency ' + dot.cells[1] + ', ' + dot.cells[3] + ' a request, ' + dot.cells[0] + ' calls';
    circle.append(title);
    return circle;
  }));
  svg.setAttribute('aria-label', 'Reward against latency of ' + known.length + ' models. The table has all values.');
  put(find('chart-high', part), known.length ? 'reward 1' : 'No call in this period was scored.');
  put(find('chart-first', part), 'faster');
  put(find('chart-last', part), 'slower (median latency)');
  legend(part, known.map(dot => dot.name));
  fill(part.querySelector('table'), ['Model', 'Calls', 'Median latency', 'Mean reward', 'Cost per request'], dots.map(dot => [dot.name, ...dot.cells]));
  return part;
}

function barsOf(title, about, bars, none) {
  const part = find('bars-template').content.firstElementChild.cloneNode(true);
  put(find('chart-title', part), title);
  put(find('chart-about', part), about);
  find('dash-frame', part).setAttribute('aria-label', title);
  put(find('bars-none', part), none);
  find('bars-none', part).hidden = bars.length > 0;
  part.querySelector('tbody').replaceChildren(...bars.map(bar => {
    const made = row([bar.name, bar.words]), cell = made.lastElementChild, mark = node('i');
    mark.style.width = (100 * bar.share).toFixed(1) + '%';
    mark.hidden = !bar.share;
    cell.prepend(mark);
    return made;
  }));
  return part;
}

// ── Budgets, and what a person does ─────────────────────────────────────────────────────────────────────────────────

function drawBudgets(budgets) {
  const list = find('dash-budget-list'), now = JSON.stringify(budgets);
  if (now === shown) return;
  shown = now;
  if (list.contains(document.activeElement)) form.branch.focus();
  find('dash-no-budget').hidden = budgets.length > 0;
  list.replaceChildren(...budgets.map(budget => {
    const item = node('li', 'dash-budget'), bar = node('div', 'budget-bar'), mark = node('i');
    item.dataset.state = budget.state;
    mark.style.width = (100 * budget.share).toFixed(1) + '%';
    bar.append(mark);
    const state = {ok: '', warning: ' · nearly spent', spent: budget.stop ? ' · spent: paid calls are stopped' : ' · spent'}[budget.state];
    const remove = node('button', '', 'Remove');
    remove.type = 'button';
    remove.setAttribute('aria-label', 'Remove the budget of ' + budget.name);
    remove.addEventListener('click', () => trigger('budget', {do: 'remove', branch: budget.branch}));
    const words = node('p');
    words.append(node('bdi', 'budget-name', budget.name), ' ' + budget.words + state + (budget.stop && budget.state !== 'spent' ? ' · stops at 100 %' : ''));
    item.append(words, bar, remove);
    return item;
  }));
}

form.addEventListener('submit', event => {
  event.preventDefault();
  trigger('budget', {do: 'set', branch: form.branch.value, limit: form.limit.value, stop: form.stop.checked});
  form.reset();
});
demo.addEventListener('click', () => { demo.disabled = true; put(find('dash-demo-state'), 'The demonstration model answers …'); trigger('demonstrate', {}); });
watch('value', draw);
draw();
