// Draws the choices as check boxes and keeps props.value, the list of chosen names, in step with them.

const list = element.querySelector('.picker-list'), chosen = element.querySelector('.picker-chosen');
const details = element.querySelector('details');

function node(name, className, text) {
  const made = document.createElement(name);
  made.className = className;
  if (text !== undefined) made.textContent = text;
  return made;
}

function build() {
  const focused = document.activeElement && list.contains(document.activeElement) ? document.activeElement.value : null;
  list.querySelectorAll('label').forEach(label => label.remove());
  for (const choice of props.choices || []) {
    const label = node('label', 'picker-choice'), box = node('input', 'picker-box'), words = node('span', 'picker-words');
    box.type = 'checkbox';
    box.value = choice.name;
    box.dataset.reason = choice.reason;
    words.append(node('b', 'picker-title', choice.title));
    words.append(node('small', choice.reason ? 'picker-reason' : 'picker-note', choice.reason ? 'Not available: ' + choice.reason : choice.note));
    label.classList.toggle('greyed', Boolean(choice.reason));
    label.append(box, words);
    list.append(label);
    if (choice.name === focused) box.focus();
  }
  show();
}

function show() {
  const value = props.value || [], boxes = [...list.querySelectorAll('input')];
  for (const box of boxes) {
    box.checked = value.includes(box.value);
    box.disabled = !box.checked && (Boolean(box.dataset.reason) || value.length >= props.most);
  }
  const titles = (props.choices || []).filter(choice => value.includes(choice.name)).map(choice => choice.title);
  chosen.textContent = titles.length ? titles.join(' · ') : 'Choose one to ' + props.most;
  element.querySelector('.picker-legend').textContent = 'Up to ' + props.most + ' side by side';
}

element.addEventListener('change', event => {
  if (!event.target.matches('.picker-box')) return;
  props.value = [...list.querySelectorAll('input:checked')].map(box => box.value);
  show();
  trigger('choose');
});
document.addEventListener('click', event => { if (!element.contains(event.target)) details.open = false; });
element.addEventListener('keydown', event => {
  if (event.key === 'Escape' && details.open) { details.open = false; details.querySelector('summary').focus(); }
});
watch('choices', build);
watch('value', show);
build();
