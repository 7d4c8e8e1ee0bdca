// Draws the conversation in `props.value` (see view.py), changing only what differs, and stores it in the browser.
// gr.HTML provides element, props, trigger and watch.
const scroller = element.querySelector('.mh-scroll');
const hello = element.querySelector('.mh-hello');
const list = element.querySelector('.mh-messages');
const PREFIX = 'medhead:c:';
let drawn = [];      // the message that every node shows
let editing = -1;    // index of the message being edited
let current = null;

const make = (tag, cls, text) => {
  const node = document.createElement(tag);
  node.className = cls;
  if (text !== undefined) node.textContent = text;
  return node;
};
const tool = (name, title, text) => {
  const button = make('button', 'mh-tool', text);
  button.type = 'button';
  button.dataset.tool = name;
  button.title = title;
  return button;
};

function build(message) {
  const node = make('article', `mh-message mh-${message.role}`);
  if (message.role === 'assistant') node.append(make('div', 'mh-notice'));
  node.append(make('div', 'mh-body'));
  const foot = make('div', 'mh-foot');
  foot.append(make('span', 'mh-summary'));
  const tools = make('span', 'mh-tools');
  tools.append(tool('copy', 'Copy this message', 'Copy'));
  if (message.role === 'user') tools.append(tool('edit', 'Edit this message and answer it again', 'Edit'));
  else tools.append(tool('retry', 'Generate another answer', 'Regenerate'), tool('undo', 'Remove your message and this answer', 'Undo'));
  foot.append(tools);
  node.append(foot);
  return node;
}

function fill(node, message, before) {
  const body = node.querySelector('.mh-body');
  if (message.html !== before.html) {
    const grows = message.plain && before.plain && before.html && message.html.startsWith(before.html);
    if (grows) body.insertAdjacentHTML('beforeend', message.html.slice(before.html.length));
    else body.innerHTML = message.html;
    if (!message.plain) addCopyButtons(body);
  }
  body.classList.toggle('mh-plain', !!message.plain);
  node.classList.toggle('mh-generating', !!message.generating);
  if (message.role === 'assistant' && message.notice !== before.notice) node.querySelector('.mh-notice').textContent = message.notice;
  if (message.summary !== before.summary) node.querySelector('.mh-summary').textContent = message.summary || '';
}

function addCopyButtons(body) {
  for (const block of body.querySelectorAll('pre')) block.append(tool('code', 'Copy this code', 'Copy'));
}

function draw() {
  const value = props.value || {};
  const messages = value.messages || [];
  const changed = value.id !== current;
  const atEnd = scroller.scrollHeight - scroller.scrollTop - scroller.clientHeight < 48;
  const more = messages.length > drawn.length;
  if (changed) { list.replaceChildren(); drawn = []; editing = -1; current = value.id; }
  while (list.children.length > messages.length) { list.lastChild.remove(); drawn.pop(); }
  messages.forEach((message, index) => {
    if (drawn[index] && drawn[index].role !== message.role) {
      while (list.children.length > index) { list.lastChild.remove(); drawn.pop(); }
    }
    if (!list.children[index]) { list.append(build(message)); drawn[index] = {}; }
    if (index !== editing) fill(list.children[index], message, drawn[index]);
    drawn[index] = message;
  });
  hello.hidden = messages.length > 0;
  element.classList.toggle('mh-busy', !!value.busy);
  if (atEnd || changed || more) scroller.scrollTop = scroller.scrollHeight;
  store(value, changed);
}

function store(value, changed) {
  if (!value.id) return;
  let failed = false;
  try {
    localStorage.setItem('medhead:current', value.id);
    if (value.store) {
      const name = PREFIX + value.id;
      if (value.store.messages.length) localStorage.setItem(name, JSON.stringify(value.store));
      else localStorage.removeItem(name);
    }
  } catch (error) { failed = true; }
  if (changed || value.store) window.dispatchEvent(new CustomEvent('medhead:stored', { detail: { failed } }));
}

async function copy(text, button) {
  try { await navigator.clipboard.writeText(text); }
  catch (error) {  // without permission, or on a page without HTTPS
    const area = make('textarea', 'mh-offscreen');
    area.value = text;
    document.body.append(area);
    area.select();
    document.execCommand('copy');
    area.remove();
  }
  const label = button.textContent;
  button.textContent = 'Copied';
  setTimeout(() => { button.textContent = label; }, 1200);
}

function startEdit(index) {
  const node = list.children[index], body = node.querySelector('.mh-body');
  editing = index;
  node.classList.add('mh-editing');
  const area = make('textarea', 'mh-edit');
  area.value = drawn[index].text;
  area.rows = Math.min(8, 1 + Math.ceil(area.value.length / 60));
  const row = make('div', 'mh-edit-row');
  row.append(tool('cancel', 'Discard the changes', 'Cancel'), tool('save', 'Send the edited message', 'Send'));
  body.replaceChildren(area, row);
  area.focus();
  area.addEventListener('keydown', (event) => {
    if (event.key === 'Escape') endEdit();
    if (event.key === 'Enter' && !event.shiftKey && !event.isComposing) { event.preventDefault(); saveEdit(); }
  });
}

function endEdit() {
  if (editing < 0) return;
  const index = editing, node = list.children[index];
  editing = -1;
  if (!node) return;
  node.classList.remove('mh-editing');
  fill(node, drawn[index], {});
}

function saveEdit() {
  const index = editing, text = list.children[index].querySelector('.mh-edit').value;
  endEdit();
  if (text.trim()) trigger('ask', { action: 'edit', index, text });
}

element.addEventListener('click', (event) => {
  const example = event.target.closest('.mh-example');
  if (example) { trigger('ask', { action: 'example', text: example.textContent }); return; }
  const button = event.target.closest('.mh-tool');
  if (!button) return;
  const name = button.dataset.tool;
  const index = [...list.children].indexOf(button.closest('.mh-message'));
  if (name === 'copy') copy(drawn[index].text, button);
  else if (name === 'code') copy(button.parentElement.querySelector('code').textContent, button);
  else if (name === 'cancel') endEdit();
  else if (name === 'save') saveEdit();
  else if (element.classList.contains('mh-busy')) return;
  else if (name === 'edit') { endEdit(); startEdit(index); }
  else if (name === 'retry') trigger('ask', { action: 'retry' });
  else if (name === 'undo') trigger('undo', {});
});

watch('value', draw);
draw();
