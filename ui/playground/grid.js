// Draws the candidate grid from props.value and scores it with the sliders' weights; runs once, when the grid loads.
// All text goes in with textContent: nothing that a model or a person wrote ever passes through a template.

const find = (part, name) => part.querySelector('.' + name);
const from = name => find(element, name + '-template').content.firstElementChild.cloneNode(true);
const columnsRoot = find(element, 'grid-columns');
const columnParts = new Map();   // model -> its section
const cardParts = new Map();     // model/index -> its card
let weights = props.weights;
let run = null;

const digits = value => value === null || value === undefined ? '–' : value.toFixed(2);

function put(part, words) { if (part.textContent !== words) part.textContent = words; }

function say(part, words) {
  put(part, words || '');
  part.hidden = !words;
}

// ── Drawing what the server sent ────────────────────────────────────────────────────────────────────────────────────

function draw() {
  const data = props.value || null;
  const empty = !data || !data.columns;
  find(element, 'grid-empty').hidden = !empty;
  if (empty) { columnsRoot.replaceChildren(); columnParts.clear(); cardParts.clear(); run = null; return; }
  if (data.run !== run) {
    columnsRoot.replaceChildren(); columnParts.clear(); cardParts.clear();
    run = columnsRoot.dataset.run = data.run;
    columnsRoot.style.setProperty('--columns', data.columns.length);
    columnsRoot.dataset.output = data.output;
  }
  for (const column of data.columns) drawColumn(data, column);
  score();
}

function drawColumn(data, column) {
  let part = columnParts.get(column.name);
  if (!part) {
    part = from('column');
    part.setAttribute('aria-label', column.title);
    part.dataset.model = column.name;
    find(part, 'column-name').textContent = column.title;
    say(find(part, 'column-note'), column.note);
    columnParts.set(column.name, part);
    columnsRoot.append(part);
  }
  part.dataset.status = column.status;
  say(find(part, 'column-state'), column.state);
  say(find(part, 'column-error'), column.error);
  for (const card of column.cards) drawCard(data, column, card, part);
}

function drawCard(data, column, card, columnPart) {
  const key = column.name + '/' + card.index;
  let part = cardParts.get(key);
  if (!part) {
    part = from('card');
    part.dataset.key = key;
    cardParts.set(key, part);
    find(columnPart, 'cards').append(part);
  }
  part.dataset.state = card.state;
  part.copied = card.recipe || (data.output === 'regions' ? JSON.stringify({boxes: card.boxes, points: card.points, path: card.path || undefined}) : card.words);
  drawPicture(data, card, part);
  say(find(part, 'card-words'), card.words);
  put(find(part, 'card-canonical'), card.recipe);
  find(part, 'card-text').hidden = !card.recipe;
  say(find(part, 'card-problems'), card.problems);
  say(find(part, 'card-time'), card.time);
  drawReasoning(card.reasoning || [], part);
  find(part, 'card-copy').hidden = card.state !== 'ready';
  find(part, 'card-download').hidden = !card.recipe;
  const label = column.title + ', candidate ' + (card.index + 1);
  find(part, 'card-copy').setAttribute('aria-label', 'Copy ' + {recipe: 'recipe', text: 'text', regions: 'coordinates'}[data.output] + ' of ' + label);
  find(part, 'card-download').setAttribute('aria-label', 'Download picture of ' + label + ' in full size');
}

// What the model thought first; the marked pieces are those that the points on the photo belong to.
function drawReasoning(pieces, part) {
  find(part, 'card-thought').hidden = !pieces.length;
  const text = find(part, 'card-reasoning');
  if (text.textContent === pieces.map(piece => piece[0]).join('')) return;
  text.replaceChildren(...pieces.map(([words, grounded]) => {
    const piece = document.createElement(grounded ? 'mark' : 'span');
    piece.textContent = words;
    return piece;
  }));
}

function drawPicture(data, card, part) {
  const frame = find(part, 'card-frame'), after = find(part, 'card-after'), before = find(part, 'card-before');
  const marked = card.boxes.length || card.points.length || card.path;
  const source = data.output === 'regions' || marked ? data.photo.src : card.picture;
  frame.hidden = data.output === 'text' && !marked;
  frame.style.aspectRatio = data.photo.width + ' / ' + data.photo.height;
  if (source && after.getAttribute('src') !== source) after.setAttribute('src', source);
  after.alt = card.alt || '';
  find(part, 'card-compare').hidden = find(part, 'card-which').hidden = before.hidden = !card.picture;
  if (card.picture && !before.hasAttribute('src')) before.setAttribute('src', data.photo.src);
  if (marked && card.done && part.dataset.marked !== 'yes') drawMarks(data, card, part);
}

function drawMarks(data, card, part) {
  const marks = find(part, 'card-marks'), shape = name => document.createElementNS('http://www.w3.org/2000/svg', name);
  const width = data.photo.width, height = data.photo.height;
  marks.setAttribute('viewBox', '0 0 ' + width + ' ' + height);
  const add = (name, attributes) => {
    for (const kind of ['mark-halo', 'mark-line']) {
      const node = shape(name);
      node.setAttribute('class', kind);
      for (const [key, value] of Object.entries(attributes)) node.setAttribute(key, value);
      marks.append(node);
    }
  };
  for (const [left, top, right, bottom] of card.boxes)
    add('rect', {x: left * width, y: top * height, width: (right - left) * width, height: (bottom - top) * height});
  for (const [x, y] of card.points) add('circle', {cx: x * width, cy: y * height, r: Math.max(width, height) / 45});
  if (card.path) add('path', {d: card.path, transform: 'scale(' + width + ' ' + height + ')', 'vector-effect': 'non-scaling-stroke'});
  part.dataset.marked = 'yes';
}

// ── Scoring: on every snapshot and on every move of a slider ────────────────────────────────────────────────────────

function score() {
  const data = props.value;
  if (!data || !data.columns || data.output !== 'recipe') { say(find(element, 'grid-notice'), ''); return status(data); }
  const all = Object.values(weights).every(weight => !(weight > 0));
  say(find(element, 'grid-notice'), all ? 'All reward sliders are at zero, so nothing is rewarded and nothing can be ranked. Move one of them up.' : '');
  let best = null;
  for (const column of data.columns) {
    const totals = column.cards.map(card => total(weights, card.scores));
    const order = ranking(totals);
    arrange(column, order);
    order.forEach((place, rank) => scoreCard(data, column, column.cards[place], totals[place], rank));
    scoreColumn(data, column, totals);
    const top = order[0];
    if (totals[top] !== null && totals[top] !== undefined && (!best || totals[top] > best.total))
      best = {key: column.name + '/' + column.cards[top].index, total: totals[top]};
  }
  for (const [key, part] of cardParts) {
    const badge = key === (best && best.key) ? 'Best of all' : part.dataset.rank === '1' ? 'Best of this model' : '';
    part.dataset.best = badge === 'Best of all' ? 'all' : badge ? 'model' : '';
    say(find(part, 'card-badge'), data.columns.length === 1 && badge ? 'Best' : badge);
  }
  status(data);
}

function scoreCard(data, column, card, value, rank) {
  const part = cardParts.get(column.name + '/' + card.index);
  const scored = data.rewards.some(name => card.scores[name] !== undefined);
  find(part, 'card-score').hidden = !scored;
  part.dataset.rank = value === null ? '' : String(rank + 1);
  if (!scored) return;
  part.dataset.total = value === null ? '' : String(value);
  put(find(part, 'card-total'), digits(value));
  put(find(part, 'card-rank'), value === null ? '' : 'No. ' + (rank + 1));
  drawParts(find(part, 'card-parts'), data.rewards, card.scores);
}

function drawParts(list, names, scores) {
  if (!list.children.length)
    for (const name of names) {
      const row = document.createElement('div'), term = document.createElement('dt'), bar = document.createElement('dd');
      bar.append(document.createElement('i'), document.createElement('span'));
      term.textContent = name;
      row.append(term, bar);
      list.append(row);
    }
  names.forEach((name, place) => {
    const row = list.children[place], value = scores[name], words = digits(value);
    if (row.lastChild.lastChild.textContent !== words) {
      put(row.lastChild.lastChild, words);
      row.lastChild.firstChild.style.setProperty('--share', value || 0);
      row.title = value === null || value === undefined ? 'not applicable to this picture' : '';
    }
    row.classList.toggle('unused', !(weights[name] > 0));
  });
}

function scoreColumn(data, column, totals) {
  const part = find(columnParts.get(column.name), 'column-mean');
  const value = mean(totals);
  part.hidden = !column.cards.some(card => data.rewards.some(name => card.scores[name] !== undefined));
  part.dataset.mean = value === null ? '' : String(value);
  put(find(part, 'mean-total'), digits(value));
  const parts = data.rewards.map(name => name + ' ' + digits(mean(column.cards.map(card => card.scores[name]))));
  put(find(part, 'mean-parts'), parts.join(' · '));
}

// Puts a column's cards in order. The one with the focus is never moved, for it would lose it: the others go around it.
function arrange(column, order) {
  const list = find(columnParts.get(column.name), 'cards');
  const parts = order.map(place => cardParts.get(column.name + '/' + column.cards[place].index));
  if (parts.every((part, rank) => list.children[rank] === part)) return;
  const kept = list.contains(document.activeElement) ? document.activeElement.closest('.card') : null;
  const middle = parts.indexOf(kept);
  parts.forEach((part, rank) => {
    if (middle < 0 && list.children[rank] !== part) list.insertBefore(part, list.children[rank]);
    if (middle >= 0 && part !== kept) list.insertBefore(part, rank < middle ? kept : null);
  });
}

function status(data) { put(find(element, 'grid-status'), (data && data.status) || ''); }

// ── Hands: before/after, copying, downloading ───────────────────────────────────────────────────────────────────────

function showBefore(card, on) {
  card.classList.toggle('comparing', on);
  find(card, 'card-compare').setAttribute('aria-pressed', String(on));
}

element.addEventListener('click', event => {
  const card = event.target.closest('.card');
  if (!card) return;
  const [model, index] = [card.closest('.model-column').dataset.model, Number(card.dataset.key.split('/').pop())];
  if (event.target.closest('.card-download')) trigger('download', {model: model, index: index});
  else if (event.target.closest('.card-copy')) copy(card, event.target.closest('.card-copy'));
  else if (event.target.closest('.card-compare') || (event.target.closest('.card-frame') && touched)) {
    if (!find(card, 'card-compare').hidden) showBefore(card, find(card, 'card-compare').getAttribute('aria-pressed') !== 'true');
  }
});

let touched = false;   // the last pointer was a finger: then a tap on the picture stands for the mouse's hover
element.addEventListener('pointerdown', event => { touched = event.pointerType !== 'mouse'; });
for (const [kind, on] of [['pointerover', true], ['pointerout', false]])
  element.addEventListener(kind, event => {
    const frame = event.target.closest('.card-frame');
    if (frame && event.pointerType === 'mouse' && !event.target.closest('.card-compare') && !frame.contains(on ? null : event.relatedTarget))
      frame.classList.toggle('hovered', on);
  });

async function copy(card, button) {
  try { await navigator.clipboard.writeText(card.copied); button.textContent = 'Copied'; } catch { button.textContent = 'Select it'; }
  setTimeout(() => { button.textContent = 'Copy'; }, 1500);
}

document.addEventListener('playground-weights', event => { weights = event.detail; score(); });
watch('value', draw);
draw();
