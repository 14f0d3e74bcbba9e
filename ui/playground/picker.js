// The model picker: draws props.choices as check boxes and keeps props.value, the selected names, in step with them.

const list = element.querySelector('.picker-list'), selection = element.querySelector('.picker-selection');
const details = element.querySelector('details');

/** Draws the choices; the focused check box keeps the focus. */
function drawChoices() {
  const focused = document.activeElement && list.contains(document.activeElement) ? document.activeElement.value : null;
  list.querySelectorAll('label').forEach(label => label.remove());
  for (const choice of props.choices || []) {
    const label = createNode('label', 'picker-choice'), box = createNode('input', 'picker-box');
    const description = createNode('span', 'picker-description');
    box.type = 'checkbox';
    box.value = choice.name;
    box.dataset.reason = choice.reason;
    description.append(createNode('b', 'picker-title', choice.title));
    description.append(createNode('small', choice.reason ? 'picker-reason' : 'picker-note', choice.reason ? 'Unavailable: ' + choice.reason : choice.note));
    label.classList.toggle('disabled', Boolean(choice.reason));
    label.append(box, description);
    list.append(label);
    if (choice.name === focused) box.focus();
  }
  drawSelection();
}

/** Checks the selected boxes and disables the ones that cannot be selected. */
function drawSelection() {
  const value = props.value || [];
  for (const box of list.querySelectorAll('input')) {
    box.checked = value.includes(box.value);
    box.disabled = !box.checked && (Boolean(box.dataset.reason) || value.length >= props.max_models);
  }
  const titles = (props.choices || []).filter(choice => value.includes(choice.name)).map(choice => choice.title);
  selection.textContent = titles.length ? titles.join(' · ') : 'Select 1 to ' + props.max_models + ' models';
  drawSkills();
  element.querySelector('.picker-legend').textContent = 'Select up to ' + props.max_models + ' models to compare';
}

/** Disables the skills that no selected model has, and says which models have them. */
function drawSkills() {
  const chosen = (props.choices || []).filter(choice => (props.value || []).includes(choice.name)), missing = [];
  for (const [name, title] of Object.entries(props.skills)) {
    const input = document.querySelector('#skill input[value="' + name + '"]');
    if (!input) continue;
    const having = props.choices.filter(choice => choice.skills.includes(name)).map(choice => choice.title);
    const lacking = chosen.length > 0 && !chosen.some(choice => choice.skills.includes(name));
    input.disabled = lacking && !input.checked;
    input.closest('label').title = lacking ? 'Models that can: ' + having.join(', ') : '';
    if (lacking) missing.push(title + ' needs ' + (having[0] || 'another model') + (having.length > 1 ? ' or similar.' : '.'));
  }
  const note = element.querySelector('.picker-skills');
  note.textContent = missing.join(' ');
  note.hidden = !missing.length;
}

element.addEventListener('change', event => {
  if (!event.target.matches('.picker-box')) return;
  props.value = [...list.querySelectorAll('input:checked')].map(box => box.value);
  drawSelection();
  trigger('choose');
});
document.addEventListener('click', event => { if (!element.contains(event.target)) details.open = false; });
element.addEventListener('keydown', event => {
  if (event.key === 'Escape' && details.open) { details.open = false; details.querySelector('summary').focus(); }
});
watch('choices', drawChoices);
watch('value', drawSelection);
drawChoices();
